"""What a run is: one frozen dataclass per group of fields, with units.

None in a field means "as the preset, the pull or the tokenizer has it"; `resolved` fills such
fields in. `arguments.py` reads configs from the command line and from JSON, and checks them.
"""

import dataclasses
from typing import Annotated, Any, Literal

from train.config.ranges import Count, Momentum, NotNegative, Positive, Range, Share, Whole, Window
from train.config.rules import BOUNDED, OPTIMIZERS, SPECTRAL, Direction
from train.errors import UserError, nearest
from train.step import families

Spectral = Literal["alpha", "alphahat", "stable_rank", "entropy", "fnorm", "gradnorm"]


@dataclasses.dataclass(frozen=True)
class Model:
    """The network: a preset, and single changes to it."""

    preset: str = "tiny"
    """LLaMA (models/llama.py): toy, tiny, 9M, 20M, 60M, 130M, 350M, 1B, 3B, 7B, 13B, 33B, 65B, root-1B, llama.
    GPT (models/gpt.py): gpt-toy, gpt2-124M, gpt2-355M, gpt2-774M, gpt2-1.5B, gpt3-125M, gpt3-350M, gpt3-760M,
    gpt3-1.3B, gpt3-2.7B, gpt3-6.7B, gpt3-13B, gpt. ViT, for images (models/vit.py): vit-toy, deit-tiny, deit-small,
    deit-base, vit."""
    weights: str | None = None
    """Folder with weights to start from, as Hugging Face's transformers saves GPT-2 and LLaMA; they say the shape."""
    width: Count | None = None
    """Width of the residual stream [features]; None: the preset's, here and below."""
    mlp_width: Count | None = None
    """Width inside the MLP [features]."""
    layers: Count | None = None
    """Number of layers."""
    heads: Count | None = None
    """Number of query heads; must divide the width."""
    kv_heads: Count | None = None
    """Number of key and value heads; must divide `heads`. LLaMA only."""
    vocab_size: Count | None = None
    """Rows of the embedding [tokens]; None: as many as the tokenizer has. Not ViT."""
    positions: Count | None = None
    """Longest sequence that there are position embeddings for [tokens]. GPT only."""
    image_size: Count | None = None
    """Side of an image that the model is given [pixels]. ViT only."""
    patch_size: Count | None = None
    """Side of a patch [pixels]; must divide `image_size`. ViT only."""
    drop_path: Momentum | None = None
    """Chance that the last layer's sublayers are skipped in training; grows evenly from 0. ViT only."""
    tied: bool | None = None
    """Whether the head is the transposed embedding. Not ViT."""
    bias: bool | None = None
    """Whether matrices and norms have biases. GPT only."""
    rope_base: Positive | None = None
    """Longest rotary wavelength / 2 pi [positions]. LLaMA only."""
    norm_eps: Positive | None = None
    """Added to the mean square or the variance in a norm."""
    init_std: Positive | None = None
    """Standard deviation of every matrix at the start."""
    base_width: Count | None = None
    """Width that the learning rate and the decay were found at; model and optimizer scale from it."""
    base_head_width: Count | None = None
    """Width of an attention head there; None: as here."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of activations; weights are float32."""
    attention: Literal["xla", "cudnn"] | None = None
    """Which kernel; cudnn needs an NVIDIA GPU and bfloat16."""
    remat: Literal["none", "dots", "full"] | None = None
    """What the backward pass recomputes instead of storing."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The text, train/data/batches.py; for images, the batch size alone applies."""

    text: str = "stdlib"
    """Folder, file or glob of text; stdlib: the running Python's; zipf: made up; store:FOLDER: see tokenise."""
    tokenizer: str = "bpe-4096"
    """bytes; bpe-N: N byte pairs (512 to 65536), learned from the text; tokenizer.json, or its folder."""
    length: Count = 256
    """Length of a sequence [tokens]."""
    documents: bool = False
    """Each sequence is one document, cut or filled to the length, as in the recipes for C4; else all stand in a row."""
    batch_size: Count = 8
    """Sequences, or images, per update, over all devices."""
    cache: str = ".cache/data"
    """Folder that keeps vocabularies and encoded text for the next start."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images for a ViT, and what is done to them in training, train/data/images.py."""

    name: str = "imagenet2012"
    """Data set as tfds names it, prepared as array_record: NAME, NAME/CONFIG or NAME/CONFIG:VERSION."""
    folder: str | None = None
    """Where data sets are prepared; None: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    split: str = "train"
    """Part to train on, such as train[:95%]."""
    held_out: str | None = None
    """Part to evaluate on; None: validation, or test."""
    magnitude: Annotated[float, Range(0, 10)] = 9.0
    """Strength of RandAugment's changes [0 to 10]; 0: none."""
    erasing: Share = 0.25
    """Probability that a rectangle becomes noise."""
    mixup: NotNegative = 0.8
    """Parameter of the Beta distribution of shares when two images are blended; 0: none are."""
    cutmix: NotNegative = 1.0
    """The same when a rectangle of another image is pasted; each half of the time if both are on."""
    smoothing: Share = 0.1
    """Share of a label that is spread evenly over all classes."""
    average: Momentum | None = None
    """Share of a running mean of the weights kept per step, evaluated as well; None: no mean."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Turns gradients into updates; its link of the chain before the decay."""

    name: Direction = "adam"
    """With the default decay adam is AdamHD, with --decay.pull l2 AdamW; nadam is Nesterov's, sophia Sophia-G."""
    learning_rate: Positive = 3e-3
    """Peak learning rate [per step]."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    schedule_steps: Count | None = None
    """Where the schedule ends [steps]; the rate stays as it is from there on; None: run.steps."""
    warmup_steps: Whole | None = None
    """Climb to the peak [steps]; None: a tenth of the schedule, at most 2000."""
    final: Share | None = None
    """Learning rate at the end of the schedule, as a share of its peak; default 0.1."""
    b1: Momentum = 0.9
    """Share of the first moment that is kept per step."""
    b2: Momentum = 0.95
    """Share of the second moment (for lion: of the momentum) that is kept per step."""
    eps: Positive | None = None
    """Added to the root of the second moment; default 1e-8. For sophia, added to the curvature; 1e-15."""
    momentum: Momentum | None = None
    """Share of root's momentum that is kept per step; b1 and b2 are of its Adam part; default 0.95."""
    refresh_every: Count | None = None
    """Between two bases of conda (default 2000) or two curvatures of sophia (default 10) [steps]."""
    scale: Positive | None = None
    """Step of conda's matrices over that of its Adam part; default 0.25."""
    gamma: Positive | None = None
    """Of sophia: curvature times gamma is what a momentum of unit win rate has; default 0.05."""
    freeze: Literal["settled"] | Count | None = None
    """Of one_bit_adam: steps until signs cross mesh.replica, or once the variance settled; default a fifth of all."""
    layout: Literal["joined", "per_leaf", "flat"] | None = None
    """What of one_bit_adam shares an exchange: all matrices, each its own, all with one scale; default joined."""
    bias_correction: bool | None = None
    """Whether one_bit_adam corrects its moments as adam does, which its paper does not; default True."""
    largest_direction: Positive | None = None
    """Bound of how far one_bit_adam moves a weight per step once signs are sent, over the learning rate; default 1."""
    clip: Positive | None = 1.0
    """Longest gradient, as a global norm; with one_bit_adam, of each worker; None: no clipping."""
    spike_sigma: Positive | None = None
    """Leave out steps whose loss or gradient norm is so many standard deviations too high; NaN always is."""
    spike_window: Window | None = None
    """Steps that are compared with; default 128."""


@dataclasses.dataclass(frozen=True)
class Decay:
    """The weight decay, optax_decay.decay: adds weight_decay * pull(w) to the update."""

    weight_decay: NotNegative = 0.1
    """Coefficient; what it multiplies is the coupling."""
    pull: Literal["huber", "l2", "pseudo_huber", "log_cosh", "fair", "l1"] = "huber"
    """What a weight w feels: l2 is w itself, huber is w clipped at plus and minus the threshold."""
    threshold: Literal["mean", "rms", "ema"] | Positive | None = None
    """A number [unit of the weights], or factor times a matrix's mean |w|, RMS or running mean."""
    factor: Positive | None = None
    """Of a threshold given by name; default 1.5."""
    memory: Momentum | None = None
    """Share of the running mean kept per step, for the threshold ema; default 0.99."""
    cautious: bool = False
    """Decay only where the update already moves the weight towards zero."""
    proximal: bool = False
    """Take the implicit (proximal) step after the update instead; for l2, l1, huber and fair."""
    coupling: Literal["lr", "schedule", "corrected", "none"] = "lr"
    """Shrink per step, with r the rate: weight_decay times r, r/peak, r*r/peak, or 1."""
    mask: tuple[Literal["hidden", "head", "embedding", "vector"], ...] = ("hidden", "head")
    """Roles of parameters that decay."""
    spectral: Spectral | None = None
    """Multiply the decay of each hidden matrix by a map of this number of its spectrum (AlphaDecay)."""
    spectral_low: NotNegative | None = None
    """Multiplier of the matrix with the smallest number; default 2/3."""
    spectral_high: NotNegative | None = None
    """Multiplier of the matrix with the largest number; default 3."""
    spectral_every: Count | None = None
    """Between two measurements of one matrix [steps]; default 500."""
    spectral_size: Count | None = None
    """Matrices with fewer eigenvalues are not measured; default 50."""
    width_rule: Literal["fan2025", "mup_package", "constant", "qiu2025", "timescale"] | None = None
    """How the decay of matrices follows the width, with model.base_width; default fan2025."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices in a grid; weights are split over fsdp and tensor, sequences over replica, data and fsdp."""

    replica: Count = 1
    """Copies of the model with a slow network between them, such as slices; one_bit_adam's workers."""
    data: Count | None = None
    """Copies of the model within each replica; None: as many as the devices allow."""
    fsdp: Count = 1
    """Parts that every parameter is split into and gathered from for use."""
    tensor: Count = 1
    """Parts that heads, MLP features and vocabulary are split into."""


@dataclasses.dataclass(frozen=True)
class Run:
    """How long, how often, where."""

    name: str = "small"
    """Names the run folder, runs/NAME-001, 002, ..."""
    folder: str | None = None
    """The run folder itself; an existing one is continued if the config agrees."""
    steps: Count = 700
    """Updates in all, those of an earlier part of the run included [steps]."""
    seed: Whole = 0
    """Of the initial weights and of the order of the data."""
    micro_batches: Count = 1
    """Parts that a batch is worked through in, to save memory; must divide data.batch_size."""
    max_skipped: Count = 10
    """Steps left out in a row, for NaN or spikes, after which the run stops."""
    log_every: Count = 1
    """Between two records in metrics.jsonl [steps]."""
    eval_every: Count = 50
    """Between two evaluations on held-out text and looks at the weights [steps]."""
    eval_batches: Count = 8
    """Held-out batches per evaluation."""
    save_every: Count = 100
    """Between two checkpoints [steps]."""
    keep: Count = 2
    """Checkpoints kept, the newest ones; with one, a damaged checkpoint leaves nothing to fall back on."""
    keep_every: Count | None = None
    """Checkpoints kept for good: those of every so many steps [steps]; None: none."""
    migrate: bool = False
    """Go on with another optimizer or decay than the checkpoint's; says what of its state was kept."""
    tensorboard: bool = True
    """Write TensorBoard events if tensorboardX is installed."""
    wandb: str | None = None
    """Report to this Weights & Biases project; needs the package wandb."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    images: Images = dataclasses.field(default_factory=Images)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    decay: Decay = dataclasses.field(default_factory=Decay)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    run: Run = dataclasses.field(default_factory=Run)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """All fields by dotted name, such as "optimizer.learning_rate"."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found |= flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
    return found


def replace(config: Config, changes: dict[str, Any]) -> Config:
    """The config with the fields of the given dotted names changed."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    parts = {g: dataclasses.replace(getattr(config, g), **fields) for g, fields in groups.items()}
    return dataclasses.replace(config, **parts)


def preset_of(model: Model) -> Any:
    """The Config of models/ that a preset names.

    Raises:
        UserError: there is no such preset.
    """
    if model.preset not in families.PRESETS:
        names = list(families.PRESETS)
        raise UserError(
            f"model.preset = {model.preset!r} does not exist; allowed are {', '.join(names)};"
            f" nearest: {nearest(model.preset, names)}."
        )
    return families.PRESETS[model.preset]


def resolved(config: Config) -> Config:
    """The config with every None that stands for a known value filled in."""
    model, optimizer, decay = config.model, config.optimizer, config.decay
    preset = preset_of(model)
    steps = optimizer.schedule_steps or config.run.steps
    named = decay.threshold is None or isinstance(decay.threshold, str)
    fill: dict[str, Any] = {
        f"model.{name}": getattr(preset, name)
        for name in vars(model)
        if hasattr(preset, name) and name != "vocab_size"
    }
    fill |= {"optimizer.warmup_steps": min(steps // 10, 2000)}
    fill |= {f"optimizer.{name}": value for name, value in OPTIMIZERS[optimizer.name].items()}
    if optimizer.name == "one_bit_adam":
        climb = optimizer.warmup_steps or fill["optimizer.warmup_steps"]
        fill["optimizer.freeze"] = max(1, steps // 5, climb)
    if optimizer.schedule != "constant":
        fill |= {"optimizer.schedule_steps": steps, "optimizer.final": 0.1}
    if optimizer.spike_sigma:
        fill |= {"optimizer.spike_window": 128}
    if decay.spectral:
        fill |= {f"decay.{name}": value for name, value in SPECTRAL.items()}
    if model.base_width:
        fill |= {"decay.width_rule": "fan2025"}
    if decay.pull in BOUNDED:
        fill |= {"decay.threshold": "mean"}
        fill |= {"decay.factor": 1.5} if named else {}
        fill |= {"decay.memory": 0.99} if decay.threshold == "ema" else {}
    values = flatten(config)
    return replace(config, {name: v for name, v in fill.items() if values[name] is None})


def model_config(config: Config, outputs: int) -> Any:
    """The network of a resolved config, a Config of models/, for so many tokens of a tokenizer, or classes.

    Raises:
        UserError: a shape that does not work out, or an embedding that is too small.
    """
    preset = preset_of(config.model)
    fields: Any = {name: v for name, v in vars(config.model).items() if hasattr(preset, name)}
    rows = config.model.vocab_size or outputs
    if rows < outputs:
        raise UserError(
            f"model.vocab_size = {rows} is smaller than the tokenizer's {outputs} tokens;"
            f" nearest: {outputs}."
        )
    count = "vocab_size" if hasattr(preset, "vocab_size") else "classes"
    try:
        return dataclasses.replace(preset, **(fields | {count: rows}))
    except ValueError as error:
        raise UserError(f"The model does not work out: {error}.") from None


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ once both are resolved, by name: (old, new)."""
    a, b = flatten(resolved(old)), flatten(resolved(new))
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}
