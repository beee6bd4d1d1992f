"""Every piece of advice by its code: what docs/advice.md explains and --ignore_advice silences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Meaning(NamedTuple):
    """What is behind a code: when it is given, why it matters, what to do."""

    when: str
    why: str
    todo: str


MEANINGS: Mapping[str, Meaning] = {
    "flux-guidance": Meaning(
        "guidance_scale is not given, so Kohya's default of 3.5 holds",
        "FLUX.1 dev takes the strength of guidance as an input. At 3.5 the LoRA learns its subject as an effect of "
        "strong guidance; at 1.0 it learns the plain picture and works at the strengths people draw with.",
        "guidance_scale = 1.0",
    ),
    "flux-timesteps": Meaning(
        "timestep_sampling is not given, so Kohya's default `sigma` holds",
        "FLUX was trained with timesteps shifted towards noise, the more the larger the picture.",
        'timestep_sampling = "shift" with discrete_flow_shift = 3.1582, or "flux_shift", which follows the size',
    ),
    "flux-prediction": Meaning(
        "model_prediction_type is not given, so Kohya's default `sigma_scaled` holds",
        "FLUX predicts a velocity. `sigma_scaled` turns it into a picture before the loss is taken, which weighs noisy "
        "timesteps differently from how FLUX was trained.",
        'model_prediction_type = "raw"',
    ),
    "flux-shift": Meaning(
        "discrete_flow_shift is not given, but the timestep sampling uses it",
        "It moves timesteps towards noise. FLUX's own value for pictures of 1024 x 1024 is exp(1.15) = 3.1582.",
        "discrete_flow_shift = 3.1582",
    ),
    "t5-mask": Meaning(
        "apply_t5_attn_mask is on",
        "The LoRA learns with the padding of captions masked; ComfyUI and diffusers draw without that mask, so "
        "pictures there may differ from the samples drawn during training.",
        "leave apply_t5_attn_mask out, unless the program you draw with masks too",
    ),
    "secrets-on-command-line": Meaning(
        "a token or key is given on the command line",
        "Command lines are shown to every user of a machine.",
        "set the environment variable that the message names",
    ),
    "flux-fp16": Meaning(
        'mixed_precision is "fp16"',
        "Activations of FLUX exceed 65504, the largest number of fp16, and the loss becomes NaN.",
        'mixed_precision = "bf16"; cards before Ampere have no fast bf16, there "no" is the safe choice',
    ),
    "flux-precision": Meaning(
        'mixed_precision is "no" on a model of FLUX\'s size',
        "The frozen weights are then kept in float32: 48 GB for the transformer alone, and slow.",
        'mixed_precision = "bf16"',
    ),
    "fp8-upcast": Meaning(
        "the transformer file is stored in fp8 and fp8_base is off",
        "Every weight is cast up to the training precision when it is loaded: twice the file's size with bf16.",
        "fp8_base = true keeps them in 8 bits; or use the bf16 file, which is more exact",
    ),
    "text-encoders-loaded": Meaning(
        "cache_text_encoder_outputs is off although nothing needs it to be",
        "T5 and CLIP-L stay in memory and run in every step (T5-XXL takes 9 GB in 16 bits).",
        "cache_text_encoder_outputs = true",
    ),
    "clip-l-trained": Meaning(
        "network_train_unet_only is off and text_encoder_lr is not given",
        "Kohya then trains a LoRA for CLIP-L too, with learning_rate. It has to stay loaded, and many programs "
        "ignore that part of the file.",
        "network_train_unet_only = true, or text_encoder_lr to say that it is meant",
    ),
    "text-encoder-lr-unused": Meaning(
        "text_encoder_lr is given with network_train_unet_only",
        "No text encoder is trained, so the rate is not used.",
        "remove one of the two",
    ),
    "learning-rate-default": Meaning(
        "learning_rate is not given, so Kohya's default of 2e-6 holds",
        "A LoRA learns almost nothing at that rate.",
        "learning_rate = 1e-4; 1.0 for Prodigy and D-Adaptation",
    ),
    "learning-rate-adaptive": Meaning(
        "an optimizer that finds its own rate is given one that is far from 1",
        "Prodigy and D-Adaptation multiply what they find by learning_rate: 1e-4 makes them stand still.",
        "learning_rate = 1.0",
    ),
    "learning-rate-high": Meaning(
        "the rate is above 2e-3", "A LoRA of FLUX is likely to diverge or to burn in.", "1e-4 to 4e-4"
    ),
    "learning-rate-low": Meaning(
        "the rate is below 1e-6", "Too little changes within a usual run.", "1e-4 to 4e-4"
    ),
    "network-dim-default": Meaning(
        "network_dim is not given",
        "Kohya's default is 4, which has little room to learn.",
        "network_dim = 16 or 32",
    ),
    "network-alpha": Meaning(
        "network_alpha / network_dim is below 0.1, often because alpha was left at its default of 1",
        "What the LoRA adds is scaled by alpha / dim. A small scale acts like a small learning rate.",
        "network_alpha = network_dim, or half of it",
    ),
    "samples-never": Meaning(
        "sample_prompts is given, but no schedule",
        "No sample image is drawn.",
        "sample_every_n_epochs = 1, or sample_every_n_steps",
    ),
    "caption-variants": Meaning(
        "captions change from visit to visit and text encoder outputs are cached",
        "So many captions of each image as text_cache_variants says are encoded, and visits take them in turn.",
        "a larger text_cache_variants, up to the visits of an image; or cache_text_encoder_outputs = false",
    ),
    "caption-variants-seed": Meaning(
        "such captions are cached on disk and seed is not given",
        "Each run draws another seed, and with it other captions, so the cache is made anew.",
        "seed, any number",
    ),
    "schnell-base": Meaning(
        "the base model is FLUX.1 schnell",
        "It is distilled to few steps; training undoes that, and LoRAs come out weaker than on dev. It takes no "
        "guidance, so guidance_scale has no effect.",
        "train on dev, or draw with more than 4 steps afterwards",
    ),
    "images-cropped": Meaning(
        "enable_bucket is off and pictures have another aspect ratio than resolution",
        "They are cropped to the shape of resolution, and what lies outside is never seen.",
        "enable_bucket = true",
    ),
    "images-enlarged": Meaning(
        "pictures are enlarged by more than 1.5 to fill their bucket",
        "The LoRA learns the blur.",
        "larger pictures, a lower resolution, or bucket_no_upscale = true",
    ),
    "images-identical": Meaning(
        "several files have the same content",
        "That picture is learnt as often as it is there, which is rarely meant.",
        "remove the copies, or use repeats to weigh a folder",
    ),
    "buckets-small": Meaning(
        "buckets hold fewer samples than train_batch_size",
        "Their batches are smaller than asked for, in every epoch.",
        "a larger bucket_reso_steps, more pictures of that shape, or a smaller train_batch_size",
    ),
    "captions-identical": Meaning(
        "all pictures have the same caption although there are caption files",
        "What varies between pictures is bound to that one text too.",
        "describe in each caption what is particular to the picture",
    ),
    "captions-empty": Meaning(
        "captions are empty",
        "These pictures are learnt without words and change what every prompt draws.",
        "write captions",
    ),
    "captions-cut": Meaning(
        "captions have more T5 tokens than t5xxl_max_token_length",
        "What comes after is cut off.",
        "shorten them, or raise t5xxl_max_token_length (512 is what dev was trained with)",
    ),
    "steps-few": Meaning(
        "each picture is seen fewer than 25 times in the run",
        "Subjects are usually learnt after 40 to 100 visits of each picture.",
        "more repeats, epochs or steps",
    ),
    "steps-many": Meaning(
        "each picture is seen more than 250 times in the run",
        "Most LoRAs are overtrained by then.",
        "fewer repeats or epochs, and save_every_n_epochs to choose the best",
    ),
    "save-never": Meaning(
        "the saving interval is longer than the run",
        "Only the final file is written.",
        "a shorter interval, or leave it out",
    ),
    "sample-never": Meaning(
        "the sampling interval is longer than the run", "No sample image is drawn.", "a shorter interval"
    ),
    "validation-never": Meaning(
        "the validation interval is longer than the run",
        "The loss is only taken at the start.",
        "a shorter interval",
    ),
    "validation-empty": Meaning(
        "validation_split is set, but no folder is large enough for its share to be one picture",
        "At least ceil(n * (1 - validation_split)) of a folder's n pictures are trained on, as in Kohya, so nothing is "
        "validated.",
        "a larger validation_split, or none",
    ),
    "validation-small": Meaning(
        "validation_split holds back one picture only",
        "The validation loss then says how that one picture fares.",
        "a larger validation_split, or none",
    ),
    "prior-loss-weight-unused": Meaning(
        "prior_loss_weight is given, but there is no regularisation image",
        "It weighs regularisation images only.",
        "reg_data_dir, or is_reg in a dataset_config; else leave it out",
    ),
    "files-replaced": Meaning(
        "output_dir holds files with the names that the run will write",
        "They are replaced, each as a whole, when their turn comes.",
        "another output_name, or move them away",
    ),
    "state-newer": Meaning(
        "output_dir holds a state of this output_name, and the run starts afresh",
        "The steps done are done again.",
        "--resume auto",
    ),
    "disk-space": Meaning(
        "what the run will write does not fit on the disk",
        "Saves fail while the disk is full; what was written before stays whole, the last files go elsewhere.",
        "free space, save less often, or keep fewer files (save_last_n_epochs)",
    ),
}


def advice_markdown() -> str:
    """The page docs/advice.md."""
    parts = [INTRODUCTION]
    for code, meaning in MEANINGS.items():
        parts.append(f"## {code}\n\nWhen {meaning.when}.\n{meaning.why}\n\nInstead: {meaning.todo}.\n")
    return "\n".join(parts)


INTRODUCTION = """\
# Advice

Made by `python -m tools.write_options` from `library/config/advice.py`. A config that can be used but is likely to
disappoint is run all the same, and said so, in a line that begins with a code:

    [flux-guidance] guidance_scale is not given and stays at 3.5: ...

`--ignore_advice flux-guidance flux-shift` (or `ignore_advice = ["flux-guidance"]` in the file) silences advice by its
code. `--strict_config` makes an error of all that is left to say. `--dry_run` gives all advice before anything is
loaded.
"""
