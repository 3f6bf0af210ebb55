"""The tasks: what each one needs of data, model, scores and files."""
