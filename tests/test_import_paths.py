"""The import paths that scripts written for AVION use."""

import importlib

import pytest

PATHS = {
    "avion.data.clip_dataset": ["VideoCaptionDatasetCLIP", "VideoClassyDataset", "get_downstream_dataset"],
    "avion.data.tokenizer": ["tokenize"],
    "avion.data.transforms": ["Permute", "SpatialCrop"],
    "avion.losses.losses": ["ClipLoss", "MaxMarginRankingLoss"],
    "avion.models.model_clip": "CLIP VideoClassifier CLIP_VITB32 CLIP_VITB16 CLIP_VITL14 CLIP_VITL14_336PX".split(),
    "avion.models.utils": ["inflate_positional_embeds"],
    "avion.optim.schedulers": ["cosine_scheduler"],
    "avion.utils.evaluation_ek100mir": ["get_mAP", "get_nDCG"],
    "avion.utils.distributed": "get_model get_rank get_world_size init_distributed_mode is_dist_avail_and_initialized "
    "is_main_process random_seed save_on_master".split(),
    "avion.utils.meters": ["AverageMeter", "ProgressMeter"],
    "avion.utils.misc": ["check_loss_nan", "generate_label_map", "interpolate_pos_embed"],
    "avion.utils.evaluation_ek100cls": ["get_marginal_indexes", "marginalize", "get_mean_accuracy"],
}


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in PATHS.items() for name in names])
def test_path_exists(module, name):
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("avion.utils.evaluation_ek100mir", "avion.evaluation.ek100_mir"),
        ("avion.utils.evaluation_ek100cls", "avion.evaluation.ek100_cls"),
    ],
)
def test_old_path_gives_the_thing_itself(old, new):
    for name in importlib.import_module(old).__all__:
        assert getattr(importlib.import_module(old), name) is getattr(importlib.import_module(new), name)
