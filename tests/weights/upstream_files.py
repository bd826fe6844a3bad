"""Checkpoint files with everything that upstream's scripts write into them, and the fixtures of that kind.

    python -m tests.weights.upstream_files pretrained             # completes tests/fixtures/*_checkpoint.pt
    python -m tests.weights.upstream_files classifier ID6 NAME    # writes tests/fixtures/NAME.pt, with your pandas

Tests only read what these commands wrote: they need no pandas. The tensors of the optimizer's state are views of one
buffer, so that a file stays small; their names, shapes and types are upstream's.
"""

import argparse
import sys
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from tests.weights.checkpoints import FIXTURES, contents, fixture

ACTIONS = sorted(f"{i % 7}:{11 * i % 40}" for i in range(32))  # in the order of texts, as upstream numbers them
_DISTRIBUTED = {"rank": 0, "world_size": 8, "gpu": 0, "local_rank": 0, "distributed": True, "dist_url": "env://"}
_SHARED = {
    **_DISTRIBUTED, "dist_backend": "nccl", "video_chunk_length": 15, "norm_style": "openai", "fused_decode_crop": True,
    "decode_threads": 1, "grad_checkpointing": True, "use_fast_conv1": True, "use_flash_attn": True,
    "patch_dropout": 0.0, "drop_path_rate": 0.0, "resume": "", "use_zero": False, "start_epoch": 0, "lr_start": 1e-6,
    "lr_end": 1e-5, "update_freq": 1, "betas": [0.9, 0.999], "eps": 1e-8, "disable_amp": False, "grad_clip_norm": None,
    "print_freq": 10, "workers": 8, "evaluate": False, "seed": 0, "output_dir": "experiments/run/",
}  # fmt: skip
_EK100 = "datasets/EK100/epic-kitchens-100-annotations"
PRETRAIN = {
    **_SHARED, "dataset": "ego4d", "root": "datasets/Ego4D/videos_320px_15sec/",
    "root_val": "datasets/EK100/EK100_320p_15sec/", "train_metadata": "datasets/Ego4D/ego4d_train.pkl",
    "train_metadata_aux": None, "val_metadata": f"{_EK100}/retrieval_annotations/EPIC_100_retrieval_test.csv",
    "relevancy_path": f"{_EK100}/retrieval_annotations/relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl",
    "context_length": 77, "vocab_size": 49408, "clip_length": 4, "clip_stride": 16, "freeze_temperature": True,
    "pretrain_zoo": "openai", "pretrain_path": None, "project_embed_dim": 256, "local_loss": False,
    "gather_with_grad": True, "epochs": 5, "warmup_epochs": 1, "batch_size": 64, "optimizer": "adamw", "lr": 3e-5,
    "fix_lr": True, "wd": 0.01, "eval_freq": 1, "use_bf16": False, "dataset_val": "ek100_mir",
    "evaluate_task": "ek100_mir",
}  # fmt: skip
LAVILA = {
    "dataset": "ego4d", "root": "datasets/Ego4D/video_5min_chunks_288px/", "metadata": "datasets/Ego4D/ego4d_train.pkl",
    "metadata_aux": None, "output_dir": "lavila_base/", "clip_stride": 16, "sparse_sample": False,
    "narration_selection": "random", "num_hard_neg": 0, "resume": "", "epochs": 5, "warmup_epochs": 1, "start_epoch": 0,
    "batch_size": 32, "lr": 3e-5, "fix_lr": True, "lr_start": 1e-6, "lr_end": 1e-5, "update_freq": 1, "wd": 0.01,
    "betas": [0.9, 0.999], "eps": 1e-8, "eval_freq": 99, "eval_in_middle_freq": -1, "save_freq": 1,
    "disable_amp": False, "use_zero": True, "use_checkpoint": True, "contrastive_use_vissl": True, "gated_xattn": False,
    "random_init_gpt2": False, "project_embed_dim": 256, "print_freq": 10, "workers": 10, "evaluate": False, "seed": 0,
    "wandb": False, "dist_backend": "nccl",
}  # fmt: skip
CLASSIFY = {
    **_SHARED, "dataset": "ek100_cls", "root": "datasets/EK100/EK100_320p_15sec/",
    "train_metadata": f"{_EK100}/EPIC_100_train.csv", "val_metadata": f"{_EK100}/EPIC_100_validation.csv",
    "num_crops": 1, "num_clips": 1, "clip_length": 4, "clip_stride": 4, "use_multi_epochs_loader": True,
    "drop_path_rate": 0.1, "dropout_rate": 0.5, "num_classes": 3806.0, "pretrain_model": "checkpoint_best.pt",
    "mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": None, "mixup_prob": 1.0, "mixup_switch_prob": 0.5,
    "mixup_mode": "batch", "smoothing": 0.1, "epochs": 100, "warmup_epochs": 2, "batch_size": 64, "optimizer": "sgd",
    "lr": 0.024, "lr_start": 8e-6, "lr_end": 8e-5, "wd": 5e-4, "eval_freq": 5, "pickle_filename": "",
}  # fmt: skip


def action_mappings(actions=ACTIONS):
    """mapping_act2v and mapping_act2n."""
    return tuple({i: int(action.split(":")[part]) for i, action in enumerate(actions)} for part in (0, 1))


def optimizer_state(weights, *, sgd):
    """AdamW's or SGD's `state_dict`, of a group with weight decay and one without."""
    shared = torch.zeros(max(value.numel() for value in weights.values()))
    groups = ([], [])
    for i, value in enumerate(weights.values()):
        groups[value.ndim < 2].append(i)
    options = {"lr": 3e-5, "maximize": False, "foreach": None, "differentiable": False}
    options |= (
        {"momentum": 0.9, "dampening": 0, "nesterov": False}
        if sgd
        else {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "capturable": False, "fused": None}
    )
    names = ("momentum_buffer",) if sgd else ("exp_avg", "exp_avg_sq")
    state = {
        i: {name: shared[: value.numel()].view(value.shape) for name in names}
        | ({} if sgd else {"step": torch.ones(())})
        for i, value in enumerate(weights.values())
    }
    decays = (5e-4 if sgd else 0.01, 0.0)
    return {
        "state": state,
        "param_groups": [{**options, "weight_decay": d, "params": g} for d, g in zip(decays, groups, strict=True)],
    }


def whole_file(weights, args, *, best=0.2551, epoch=5):
    """The dict that upstream's `save_on_master` is given."""
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    return {
        "epoch": epoch,
        "state_dict": weights,
        "optimizer": optimizer_state(weights, sgd=getattr(args, "optimizer", "") == "sgd"),
        "scaler": {**scaler, "_growth_tracker": 1234},
        "best_acc1": np.float64(best),
        "args": args,
    }


def save_as_on_a_gpu(file, path, **options):
    """`torch.save` of tensors that say they lie on GPU 0, as those of the released files do."""
    with mock.patch("torch.serialization.location_tag", lambda storage: "cuda:0"):
        torch.save(file, path, **options)


def classifier_weights(name):
    """Of a fixture's video tower; its head is the projection into the embedding, whose logits are embeddings."""
    towers = contents(name)["state_dict"]
    weights = {k: v for k, v in towers.items() if k.startswith("module.visual.") and "image_projection" not in k}
    (projection,) = (key for key in towers if key.endswith("image_projection"))  # LaViLa's is beside its tower
    head = towers[projection].T.contiguous()
    return weights | {"module.fc_cls.weight": head, "module.fc_cls.bias": torch.zeros(len(head))}


def expected_logits(name):
    """(video, what the head of `classifier_weights` computes from it, made unit), by upstream's modules."""
    recorded = torch.load(FIXTURES / f"{name}_expected.pt", weights_only=True)
    return recorded["video"], F.normalize(recorded["video_embed"], dim=-1)


def _write_pretrained():
    for name in ("ID4", "ID6", "VIT", "LAVILA"):
        saved = contents(name)
        known = vars(saved["args"])
        args = argparse.Namespace(**((LAVILA if name == "LAVILA" else PRETRAIN) | _DISTRIBUTED | known))
        save_as_on_a_gpu(whole_file(saved["state_dict"], args), fixture(name))


def _write_classifier(name, file, *, legacy=False):
    import pandas  # the one place that needs it

    verbs, nouns = action_mappings()
    args = argparse.Namespace(**CLASSIFY, mapping_act2v=verbs, mapping_act2n=nouns)
    args.actions = pandas.DataFrame.from_dict({"verb": verbs.values(), "noun": nouns.values()})
    whole = whole_file(classifier_weights(name), args, best=44.5, epoch=100)
    save_as_on_a_gpu(whole, FIXTURES / f"{file}.pt", _use_new_zipfile_serialization=not legacy)


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "pretrained":
        _write_pretrained()
    else:
        _write_classifier(*words[:2], legacy="legacy" in words)
