"""What each preset changes of the defaults, which are the paper's: a row of Module 1 and one of Module 2."""

_SMALL_NET = dict(
    resnet_widths=(16, 32, 64),
    transformer_width=64,
    transformer_heads=4,
    transformer_layers=2,
    similarity="cosine",
    dense_loss="nll",
    input_ppi=350.0,
    image_size=224,
    batch_size=16,
    match_border=0,
    match_threshold=0.1,
)
# the best of sweeps of 24 and 16 trials (docs/figures.md, "Sweeps")
_FOUND = dict(
    learning_rate=8e-3,
    warmup=0.18,
    weight_decay=1.3e-4,
    impostor_share=0.31,
    noise=0.74,
    thickness=1.5,
    distortion=0.22,
    partial=0.59,
    rotation=55.0,
    cosine_scale=7.5,
)
# pairs of two impressions count most, and the ridges tell impostors (docs/figures.md, "What each part gives")
_IMPRESSIONS = dict(
    impression_share=0.6, impostor_share=0.0, distortion=0.5, synthetic_share=0.5, synthetic_fingers=300
)
# on unseen sensors as good as the package, where a run from nothing is worse (docs/figures.md, "From the package on")
_FROM_PACKAGE = dict(init="auto", learning_rate=4e-3)
_FOUND_MATCH = dict(
    learning_rate=3.5e-4,
    warmup=0.16,
    weight_decay=3.7e-5,
    impostor_share=0.56,
    partial=0.89,
    rotation=42.0,
    synthetic_share=0.12,
    loss_dense=1.7,
    loss_embedding=0.13,
    loss_arcface=0.03,
    embedding_margin=0.23,
    arcface_margin=0.47,
    arcface_scale=18.0,
    global_weight=0.61,
)
# of Module 2 in every preset: what its heads need, and its inputs (docs/changing.md), of which the paper tells nothing
_SOUND = dict(masked_pooling=True, deformed=True, oriented=True)
_SMALL_MATCH = dict(_SMALL_NET, **_SOUND, seed_resnet=True, embedding_channels=16, match_threshold=0.05)
# quick shows the pipeline at work: less rotation and corruption than in earnest, and so sooner something to see
_QUICK = dict(image_size=160, synthetic_fingers=60, synthetic_impressions=6, noise=0.5, thickness=0.5, partial=0.3)
_SMOKE_NET = dict(
    resnet_widths=(8, 8, 16),
    transformer_width=16,
    transformer_heads=2,
    transformer_layers=1,
    similarity="cosine",
    dense_loss="nll",
    input_ppi=200.0,
    image_size=64,
    batch_size=4,
    match_border=0,
    match_threshold=0.1,
    canvas_size=256,
    synthetic_fingers=6,
    synthetic_impressions=2,
    held_out=0.34,
    pairs_per_epoch=8,
    num_epochs=2,
    val_pairs=8,
    save_every=1,
    alignment_samples=32,
    alignment_matches=32,
)

PRESETS = {
    "paper": (dict(wide_window=1.3), dict(_SOUND, frame_shift=4)),
    "cpu": (
        dict(
            _SMALL_NET | _FOUND | _IMPRESSIONS | _FROM_PACKAGE,
            wide_window=1.3,
            pairs_per_epoch=1600,
            num_epochs=6,
            val_pairs=128,
            save_every=2,
        ),
        dict(
            _SMALL_MATCH,
            **_FOUND_MATCH,
            pairs_per_epoch=1280,
            num_epochs=4,
            val_pairs=192,
            save_every=2,
            synthetic_fingers=100,
            roi_size=96,
            calibration_pairs=1000,
            frame_shift=8,
            label_matches=12,
        ),
    ),
    "quick": (
        dict(_SMALL_NET, **_QUICK, learning_rate=3e-3, pairs_per_epoch=960, num_epochs=5, val_pairs=64, rotation=35.0),
        dict(
            _SMALL_MATCH,
            **_QUICK,
            learning_rate=1e-3,
            pairs_per_epoch=480,
            num_epochs=4,
            val_pairs=96,
            rotation=8.0,
            loss_embedding=1.0,
            loss_arcface=0.1,
            arcface_scale=30.0,
            roi_size=64,
            calibration_pairs=300,
            frame_shift=6,
            label_matches=8,
        ),
    ),
    "smoke": (
        dict(_SMOKE_NET, template_size=32),
        dict(
            _SMOKE_NET,
            seed_resnet=True,
            roi_size=32,
            embedding_size=32,
            embedding_channels=8,
            calibration_pairs=8,
            **_SOUND,
            frame_shift=2,
        ),
    ),
}
