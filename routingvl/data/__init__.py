"""Data in public formats: images, COCO captions, VQAv2, labelled texts; batches; the files derived from them."""

from routingvl.data.coco import Caption, CaptionDataset, CaptionSplit, load_captions
from routingvl.data.collate import CaptionCollator, LabelCollator, VQACollator, collate_images
from routingvl.data.files import DataError
from routingvl.data.images import ImageDataset, ImageError, ImagePreprocessor, ImageRecord, load_image
from routingvl.data.labelled import LabelledDataset, LabelledSplit, LabelledText, load_labelled
from routingvl.data.prepare import prepare_coco, prepare_vqa
from routingvl.data.vocabulary import AnswerVocabulary, soft_scores
from routingvl.data.vqa import Question, VQASplit, load_official_vqa, load_vqa
from routingvl.data.vqa_dataset import VQADataset

__all__ = [
    "AnswerVocabulary",
    "Caption",
    "CaptionCollator",
    "CaptionDataset",
    "CaptionSplit",
    "DataError",
    "ImageDataset",
    "ImageError",
    "ImagePreprocessor",
    "ImageRecord",
    "LabelCollator",
    "LabelledDataset",
    "LabelledSplit",
    "LabelledText",
    "Question",
    "VQACollator",
    "VQADataset",
    "VQASplit",
    "collate_images",
    "load_captions",
    "load_image",
    "load_labelled",
    "load_official_vqa",
    "load_vqa",
    "prepare_coco",
    "prepare_vqa",
    "soft_scores",
]
