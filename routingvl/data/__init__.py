"""Data in public formats: images, COCO captions, VQAv2, GQA, NLVR2, labelled texts; batches; derived files."""

from routingvl.data.coco import Caption, CaptionDataset, CaptionSplit, load_captions
from routingvl.data.collate import CaptionCollator, LabelCollator, VQACollator, collate_images
from routingvl.data.files import DataError
from routingvl.data.gqa import GQAQuestion, GQASplit, load_gqa
from routingvl.data.images import ImageDataset, ImageError, ImagePreprocessor, ImageRecord, load_image
from routingvl.data.labelled import LabelledDataset, LabelledSplit, LabelledText, load_labelled
from routingvl.data.nlvr2 import NLVR2Dataset, NLVR2Split, Statement, load_nlvr2
from routingvl.data.prepare import prepare_coco, prepare_gqa, prepare_vqa
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
    "GQAQuestion",
    "GQASplit",
    "ImageDataset",
    "ImageError",
    "ImagePreprocessor",
    "ImageRecord",
    "LabelCollator",
    "LabelledDataset",
    "LabelledSplit",
    "LabelledText",
    "NLVR2Dataset",
    "NLVR2Split",
    "Question",
    "Statement",
    "VQACollator",
    "VQADataset",
    "VQASplit",
    "collate_images",
    "load_captions",
    "load_gqa",
    "load_image",
    "load_labelled",
    "load_nlvr2",
    "load_official_vqa",
    "load_vqa",
    "prepare_coco",
    "prepare_gqa",
    "prepare_vqa",
    "soft_scores",
]
