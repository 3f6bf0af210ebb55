"""Normalisation of VQA answers, as the official VQA evaluation does it (GT-Vision-Lab/VQA, 2021).

Both the answer vocabulary (routingvl.data) and the accuracy (routingvl.metrics) compare normalised answers, so the two
steps live here, below both:

    normalize_answer(s) == process_digit_article(process_punctuation(s))

The steps have quirks (marked below) that decide scores of real questions; they are kept exactly.
"""

from __future__ import annotations

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_DIGITS = "zero one two three four five six seven eight nine ten".split()
DIGIT_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}

ARTICLES = frozenset({"a", "an", "the"})

# The official table, entry by entry: "somebody'd" loses its apostrophe there, "let's" and "she's" map to themselves,
# and the four keys with a capital can never match a lower-cased word.
_CONTRACTION_PAIRS = """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
    couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
    hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd
    howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've
    it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't mightnt've=mightn't've
    mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've
    oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't
    shed've=she'd've she'dve=she'd've she's=she's shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've
    shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've
    somebodyll=somebody'll somebodys=somebody's someoned=someone'd someoned've=someone'd've
    someone'dve=someone'd've someonell=someone'll someones=someone's somethingd=something'd
    somethingd've=something'd've something'dve=something'd've somethingll=something'll thats=that's thered=there'd
    thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've
    they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've
    we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've
    whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've who'dve=who'd've
    wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've
    wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll
    yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've
    youll=you'll youre=you're youve=you've
"""
CONTRACTIONS = dict(pair.split("=") for pair in _CONTRACTION_PAIRS.split())

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official code hands re.UNICODE to sub() where its `count` belongs, so only that many periods go.
_MAX_PERIODS = int(re.UNICODE)


def process_punctuation(answer: str) -> str:
    """Delete or blank the symbols of :data:`PUNCTUATION`, then delete the first 32 periods that no digit follows.

    A symbol is deleted everywhere when it touches a space somewhere in ``answer``, or when ``answer`` holds a comma
    between two digits; otherwise each of its occurrences becomes one space. ``: ' . $ % & # *`` are no such symbols.
    """
    delete_all = _DIGIT_COMMA_DIGIT.search(answer) is not None
    result = answer
    for symbol in PUNCTUATION:
        delete = delete_all or f"{symbol} " in answer or f" {symbol}" in answer
        result = result.replace(symbol, "" if delete else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def process_digit_article(answer: str) -> str:
    """Lower-case, write number words up to ten as digits, drop articles, restore apostrophes, single-space."""
    words = (DIGIT_WORDS.get(word, word) for word in answer.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_answer(answer: str) -> str:
    """Both steps in the official order: punctuation and periods first, then numbers, articles and contractions."""
    return process_digit_article(process_punctuation(answer))
