"""A script of somebody's own as they are written for AVION: the calls of its pretraining and its retrieval
fine-tuning, in their order, with their arguments. It runs on the CPU, on models of a few thousand parameters.
"""

import argparse
import os
from collections import OrderedDict
from functools import partial

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torchvision
import torchvision.transforms._transforms_video as transforms_video
from timm.data.loader import MultiEpochsDataLoader
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader
from torch.utils.data.distributed import DistributedSampler

import avion.models.model_clip as model_clip
import avion.utils.distributed as dist_utils
from avion.data.clip_dataset import VideoCaptionDatasetCLIP, get_downstream_dataset
from avion.data.ek100 import read_ek100_retrieval, read_sentences
from avion.data.tokenizer import tokenize
from avion.data.transforms import Permute, SpatialCrop
from avion.losses.losses import ClipLoss, MaxMarginRankingLoss
from avion.models.registry import ModelConfig, register_model
from avion.models.utils import inflate_positional_embeds
from avion.optim.schedulers import cosine_scheduler
from avion.safe_pickle import load_pickle
from avion.utils.evaluation_ek100mir import get_mAP, get_nDCG
from avion.utils.meters import AverageMeter, ProgressMeter
from avion.utils.misc import check_loss_nan, generate_label_map
from avion.weights.factories import _avion_factory

MEAN, STD = [108.3272985, 116.7460125, 104.09373615000001], [68.5005327, 66.6321579, 70.32316305]
CROP = 32


def register_tiny_model() -> None:
    """`model_clip.CLIP_TINY`, a factory like the others."""
    sizes = {"img_size": CROP, "embed_dim": 32, "depth": 2, "num_heads": 2}
    text = {"text_width": 32, "text_heads": 2, "text_layers": 1}
    register_model(ModelConfig("CLIP_TINY", "joint", **sizes, **text))
    model_clip.CLIP_TINY = _avion_factory("CLIP_TINY")


def save_image_clip(path) -> None:
    """open_clip weights of CLIP_TINY's size, which stand in for the image CLIP that training starts from."""
    vision = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=16, image_size=CROP)
    text = open_clip.CLIPTextCfg(width=32, heads=2, layers=1)
    torch.save(open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).state_dict(), path)


def flags(**changed) -> argparse.Namespace:
    """AVION's flags that the calls below read, small."""
    defaults = {
        "dataset": "ego4d",
        "train_metadata_aux": None,
        "video_chunk_length": 15,
        "clip_length": 2,
        "clip_stride": 16,
        "decode_threads": 1,
        "fused_decode_crop": False,
        "model": "CLIP_TINY",
        "use_grad_checkpointing": False,
        "freeze_temperature": False,
        "use_fast_conv1": False,
        "use_flash_attn": False,
        "patch_dropout": 0.0,
        "drop_path_rate": 0.0,
        "context_length": 77,
        "vocab_size": 49408,
        "project_embed_dim": 16,
        "pretrain_zoo": "open_clip",
        "local_loss": False,
        "gather_with_grad": True,
        "epochs": 2,
        "warmup_epochs": 1,
        "start_epoch": 0,
        "batch_size": 4,
        "lr": 3e-3,
        "lr_start": 1e-6,
        "lr_end": 1e-5,
        "wd": 0.01,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "disable_amp": True,
        "print_freq": 1,
        "workers": 0,
        "world_size": 1,
        "rank": 0,
        "local_rank": 0,
        "dist_url": "env://",
        "dist_backend": "nccl",
        "seed": 0,
        "gpu": None,
    }
    return argparse.Namespace(**{**defaults, **changed})


# ---- what both jobs do -------------------------------------------------------------------------


def build_model(args, source, freeze_temperature):
    """The factory that the flags, or a checkpoint's, name."""
    return getattr(model_clip, source.model)(
        freeze_temperature=freeze_temperature,
        use_grad_checkpointing=args.use_grad_checkpointing,
        context_length=source.context_length,
        vocab_size=source.vocab_size,
        patch_dropout=args.patch_dropout,
        num_frames=args.clip_length,
        drop_path_rate=args.drop_path_rate,
        use_fast_conv1=args.use_fast_conv1,
        use_flash_attn=args.use_flash_attn,
        use_quick_gelu=True,
        project_embed_dim=source.project_embed_dim,
        pretrain_zoo=source.pretrain_zoo,
        pretrain_path=source.pretrain_path,
    )


def transforms(fused):
    if fused:
        return torchvision.transforms.Compose([]), torchvision.transforms.Compose([])
    normalize = transforms_video.NormalizeVideo(mean=MEAN, std=STD)
    train = [Permute([3, 0, 1, 2]), torchvision.transforms.RandomResizedCrop(CROP, scale=(0.5, 1.0)), normalize]
    resize = [torchvision.transforms.Resize(CROP), torchvision.transforms.CenterCrop(CROP)]
    return torchvision.transforms.Compose(train), torchvision.transforms.Compose([train[0], *resize, normalize])


def on_device(args, batch):
    """The tensors of a batch; crops of a fused decoder come as (B, T, H, W, C), not normalised."""
    videos, *rest = batch
    if args.fused_decode_crop:
        videos = videos.permute(0, 4, 1, 2, 3)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (MEAN, STD))
        videos = (videos - mean) / std
    return [videos, *rest]


def parameter_groups(model, wd):
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or any(part in name for part in ("bias", "ln", "bn", "positional_embedding"))
            (others if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": wd}, {"params": others, "weight_decay": 0}]


def loader(args, dataset, train, multi_epochs=False):
    sampler = DistributedSampler(dataset, shuffle=train) if args.distributed else None
    cls = MultiEpochsDataLoader if multi_epochs else DataLoader
    return cls(
        dataset,
        batch_size=args.batch_size,
        shuffle=train and sampler is None,
        num_workers=args.workers,
        pin_memory=False,
        sampler=sampler,
        drop_last=train,
    )


def train_one_epoch(batches, model, optimizer, scaler, lr_schedule, epoch, args, names, step):
    clock = AverageMeter("Time", ":6.2f")
    metrics = OrderedDict((name, AverageMeter(name, ":.2e")) for name in names)
    progress = ProgressMeter(len(batches), [clock, *metrics.values()], prefix=f"Epoch: [{epoch}]")
    model.train()
    for i, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr_schedule[len(batches) * epoch + i]
        optimizer.zero_grad()
        _, figures = step(on_device(args, batch))
        check_loss_nan(figures["loss"])
        scaler.scale(figures["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        dist_utils.get_model(model).logit_scale.data.clamp_(0, 4.6052)
        for name in figures:
            metrics[name].update(figures[name].item(), args.batch_size)
        if i % args.print_freq == 0:
            progress.display(i)
    progress.synchronize()
    return {name: meter.avg for name, meter in metrics.items()}


@torch.no_grad()
def validate(batches, model, args, names, step):
    """The similarities of all clips with all sentences, from every process's share; mAP and nDCG."""
    metrics = OrderedDict((name, AverageMeter(name, ":.2e")) for name in names)
    progress = ProgressMeter(len(batches), list(metrics.values()), prefix="Test: ")
    model.eval()
    shares = [([], []) for _ in range(args.world_size)]
    for i, batch in enumerate(batches):
        embeds, figures = step(on_device(args, batch))
        for side, embed in enumerate(embeds):
            gathered = [torch.zeros_like(embed) for _ in range(args.world_size)]
            dist.all_gather(gathered, embed)
            for rank, part in enumerate(gathered):
                shares[rank][side].append(part)
        for name in figures:
            metrics[name].update(figures[name].item(), args.batch_size)
        progress.display(i)
    progress.synchronize()
    clips = read_ek100_retrieval(args.val_metadata)
    ids = list(clips.narration_ids)
    sides = []
    for side in range(2):
        parts = [torch.cat(share[side]).numpy() for share in shares]
        sides.append(np.stack(parts, axis=1).reshape(-1, parts[0].shape[1])[: len(ids)])
    similarity = (sides[0] @ sides[1].T + 1) / 2
    sentences, _ = read_sentences(args.val_metadata.replace(".csv", "_sentence.csv"))
    similarity = similarity[:, [ids.index(name) for name in sentences]]
    relevancy = load_pickle(args.relevancy_path, "relevancy")
    maps, ndcgs = get_mAP(similarity, relevancy), get_nDCG(similarity, relevancy)
    return {**{n: m.avg for n, m in metrics.items()}, "avg_map": maps[2], "avg_ndcg": ndcgs[2]}


def save(args, epoch, model, optimizer, scaler, best, is_best):
    dist_utils.save_on_master(
        {
            "epoch": epoch + 1,
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict() if dist_utils.is_main_process() else None,
            "scaler": scaler.state_dict(),
            "best_acc1": best,
            "args": args,
        },
        is_best,
        args.output_dir,
    )


def wrapped(args, model):
    return DistributedDataParallel(model, bucket_cap_mb=200) if args.distributed else model


def optimization(args, model):
    """The optimizer, and the scaler of its gradients."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.wd), lr=args.lr, betas=args.betas, eps=args.eps, weight_decay=args.wd
    )
    return optimizer, torch.amp.GradScaler("cpu", enabled=not args.disable_amp)


def train_clips(args, source, tokenizer):
    return VideoCaptionDatasetCLIP(
        args.dataset,
        args.root,
        source,
        transform=transforms(args.fused_decode_crop)[0],
        is_training=True,
        tokenizer=tokenizer,
        clip_length=args.clip_length,
        clip_stride=args.clip_stride,
        chunk_len=args.video_chunk_length,
        threads=args.decode_threads,
        fast_rrc=args.fused_decode_crop,
        rrc_params=(CROP, (0.5, 1.0)),
    )


def val_clips(args, dataset, root, tokenizer):
    return VideoCaptionDatasetCLIP(
        dataset,
        root,
        args.val_metadata,
        transform=transforms(args.fused_decode_crop)[1],
        is_training=False,
        tokenizer=tokenizer,
        clip_length=args.clip_length,
        clip_stride=args.clip_stride,
        chunk_len=args.video_chunk_length,
        fast_rcc=args.fused_decode_crop,
        rcc_params=(CROP,),
    )


def fit(args, model, optimizer, scaler, loaders, names, step, always_best):
    """Train; the figures before training and after each epoch, the losses of the epochs, and the weights.

    `step` returns the features of a batch, and the figures with the loss. With `always_best`, every epoch is saved as
    the best one.
    """
    train_loader, val_loader = loaders
    lr_schedule = cosine_scheduler(
        args.lr,
        args.lr_end,
        args.epochs,
        len(train_loader),
        warmup_epochs=args.warmup_epochs,
        start_warmup_value=args.lr_start,
    )
    found, losses, best = [validate(val_loader, model, args, names, step)], [], 0.0
    for epoch in range(args.start_epoch, args.epochs):
        stats = train_one_epoch(train_loader, model, optimizer, scaler, lr_schedule, epoch, args, names, step)
        losses.append(stats["loss"])
        found.append(validate(val_loader, model, args, names, step))
        is_best = always_best or found[-1]["avg_map"] > best
        best = found[-1]["avg_map"] if is_best else best
        save(args, epoch, model, optimizer, scaler, best, is_best)
    return {"validation": found, "losses": losses, "weights": dist_utils.get_model(model).state_dict()}


# ---- the two jobs ------------------------------------------------------------------------------


def pretrain(args):
    """Returns what `fit` returns."""
    dist_utils.init_distributed_mode(args)
    dist_utils.random_seed(args.seed, dist_utils.get_rank())
    model = wrapped(args, build_model(args, args, args.freeze_temperature))
    criterion = ClipLoss(
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        cache_labels=True,
        rank=args.rank,
        world_size=args.world_size,
    )
    optimizer, scaler = optimization(args, model)
    latest = os.path.join(args.output_dir, "checkpoint.pt")
    if os.path.isfile(latest):
        checkpoint = torch.load(latest, map_location="cpu")
        args.start_epoch = checkpoint["epoch"]
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])

    tokenizer = partial(tokenize, context_length=args.context_length)
    sources = [args.train_metadata, *(args.train_metadata_aux or [])]
    datasets = [train_clips(args, source, tokenizer) for source in sources]
    val_dataset = val_clips(args, "ek100_mir", args.root_val, tokenizer)
    train_loader = loader(args, ConcatDataset(datasets) if len(datasets) > 1 else datasets[0], train=True)
    loaders = train_loader, loader(args, val_dataset, train=False)

    def step(inputs):
        inputs.pop()  # the relevancy, which pretraining does not use
        image_features, text_features, logit_scale = model(*inputs)
        return (image_features, text_features), criterion(image_features, text_features, logit_scale)

    return fit(args, model, optimizer, scaler, loaders, ["loss", "clip_acc"], step, always_best=False)


def finetune_mir(args):
    """From a checkpoint of `pretrain`; returns what `fit` returns."""
    dist_utils.init_distributed_mode(args)
    dist_utils.random_seed(args.seed, dist_utils.get_rank())
    checkpoint = torch.load(args.pretrain_model, map_location="cpu")
    state_dict = OrderedDict((k.replace("module.", ""), v) for k, v in checkpoint["state_dict"].items())
    old_args = checkpoint["args"]
    model = build_model(args, old_args, True)
    model.logit_scale.requires_grad = False
    state_dict = inflate_positional_embeds(
        model.state_dict(), state_dict, num_frames=args.clip_length, load_temporal_fix="bilinear"
    )
    model.load_state_dict(state_dict, strict=True)
    model = wrapped(args, model)
    criterion = MaxMarginRankingLoss(
        margin=0.2,
        fix_norm=True,
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        rank=args.rank,
        world_size=args.world_size,
    )
    optimizer, scaler = optimization(args, model)
    tokenizer = partial(tokenize, context_length=old_args.context_length)
    train_dataset = train_clips(args, args.train_metadata, tokenizer)
    val_dataset = val_clips(args, args.dataset, args.root, tokenizer)
    train_loader = loader(args, train_dataset, train=True, multi_epochs=args.workers > 0)
    loaders = train_loader, loader(args, val_dataset, train=False)

    def step(inputs):
        relevancies = inputs.pop()
        image_features, text_features, _ = model(*inputs)
        return (image_features, text_features), criterion(image_features, text_features, weight=relevancies)

    return fit(args, model, optimizer, scaler, loaders, ["loss", "max_margin_loss"], step, always_best=True)


def downstream(args, annotations):
    """The datasets of action recognition, with three crops in evaluation, and a classifier's logits of one clip."""
    dist_utils.init_distributed_mode(args)
    _, mapping_vn2act = generate_label_map(args.dataset, annotations)
    train_transform, val_transform = transforms(False)
    crops = torchvision.transforms.Compose(
        [Permute([3, 0, 1, 2]), torchvision.transforms.Resize(CROP), lambda x: SpatialCrop(CROP, args.num_crops)([x])]
    )
    train = get_downstream_dataset(train_transform, CROP, args, subset="train", label_mapping=mapping_vn2act)
    val = get_downstream_dataset(crops, CROP, args, subset="val", label_mapping=mapping_vn2act)
    model = model_clip.VideoClassifier(
        build_model(args, args, True).visual, dropout=0.5, num_classes=len(mapping_vn2act)
    ).eval()
    videos, labels = next(iter(DataLoader(train, batch_size=2)))
    views, _ = next(iter(DataLoader(val, batch_size=2)))
    with torch.no_grad():
        return len(train), labels, model(videos), [model(view) for view in views]
