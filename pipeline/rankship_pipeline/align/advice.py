"""Remedies for each way in which models to merge differ: the texts of differences.py, as literal tables."""

from rankship_pipeline.align.settings import LENGTH

# what is wrong with a tensor → remedy
TENSORS: dict[str, str] = {
    "missing": "save {other} from the class that {reference} was saved from, with its head, biases and norms",
    "unexpected": "drop it from {other}'s file if its forward does not need it, or give all models one architecture",
    "shape": "retrain {other} with {reference}'s shapes: one number of classes, one vocabulary (resize), equal widths",
}

# pattern of a configuration key → remedy, whether the difference is refused; the first match counts
SETTINGS: dict[str, tuple[str, bool]] = {
    "*dropout*": ("matters in training only", False),
    "*drop_path*": ("matters in training only", False),
    "*initializer*": ("matters in training only", False),
    "*pdrop*": ("matters in training only", False),
    "*layerdrop*": ("matters in training only", False),
    "router_aux_loss_coef": ("matters in training only", False),
    "router_jitter_noise": ("matters in training only", False),
    "problem_type": ("matters in training only", False),
    "finetuning_task": ("matters in training only", False),
    "gradient_checkpointing": ("matters in training only", False),
    "use_cache": ("matters in generation only", False),
    "bos_token_id": ("matters in generation only", False),
    "eos_token_id": ("matters in generation only", False),
    "max_length": ("matters in generation only", False),
    "min_length": ("matters in generation only", False),
    "max_new_tokens": ("matters in generation only", False),
    "do_sample": ("matters in generation only", False),
    "num_beam*": ("matters in generation only", False),
    "num_return_sequences": ("matters in generation only", False),
    "temperature": ("matters in generation only", False),
    "top_k": ("matters in generation only", False),
    "top_p": ("matters in generation only", False),
    "typical_p": ("matters in generation only", False),
    "*_penalty": ("matters in generation only", False),
    "early_stopping": ("matters in generation only", False),
    "*no_repeat_ngram_size": ("matters in generation only", False),
    "forced_*": ("matters in generation only", False),
    "*suppress_tokens*": ("matters in generation only", False),
    "bad_words_ids*": ("matters in generation only", False),
    "decoder_start_token_id": ("matters in generation only", False),
    "task_specific_params*": ("matters in generation only", False),
    "prefix": ("matters in generation only", False),
    LENGTH: ("the first model's limit is kept", False),
    "output_*": ("the logits are the same", False),
    "return_dict": ("the logits are the same", False),
    "chunk_size_feed_forward": ("the logits are the same", False),
    "pretraining_tp": ("the logits are the same", False),
    "vocab_size": ("use one tokenizer for both and resize: model.resize_token_embeddings(N), then train on", True),
    "tie_word_embeddings": ("tie both, or untie both: save the tied one with a copy of its embedding as head", True),
    "inputs": ("name the same inputs, in the same order, in both [[models]]", True),
    "task": ("models of one task merge; give both the same", True),
    "factory": ("build both by one factory, so that equal names mean equal computation", True),
    "id2label.*": ("the heads have different classes: keep one head per task, or train both for one label map", True),
    "label2id.*": ("the heads have different classes: keep one head per task, or train both for one label map", True),
    "*": ("with another value equal weights compute another function: train both with the same value", True),
}

_TOKENS = "the same text gives different tokens: train both with one tokenizer"
_IMAGES = "the loader prepares images in the same way for both: train both on one preparation"
# key of a tokenizer's or an image processor's file → remedy, whether the difference is refused
PREPARATION: dict[str, tuple[str, bool]] = {
    "do_lower_case": (_TOKENS, True),
    "strip_accents": (_TOKENS, True),
    "tokenize_chinese_chars": (_TOKENS, True),
    "add_prefix_space": (_TOKENS, True),
    "normalizer": (_TOKENS, True),
    "pre_tokenizer": (_TOKENS, True),
    "merges": (_TOKENS, True),
    "spiece.model": (_TOKENS, True),
    "tokenizer.model": (_TOKENS, True),
    "sentencepiece.bpe.model": (_TOKENS, True),
    "padding_side": ("the loader pads in the same way for both", False),
    "truncation_side": ("the loader cuts in the same way for both", False),
    "model_max_length": ("the loader cuts in the same way for both", False),
    "size": (_IMAGES, True),
    "do_resize": (_IMAGES, True),
    "crop_size": (_IMAGES, True),
    "do_center_crop": (_IMAGES, True),
    "do_convert_rgb": (_IMAGES, True),
    "resample": ("the loader resizes in the same way for both", False),
    "crop_pct": ("the loader crops in the same way for both", False),
}
