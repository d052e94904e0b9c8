"""What a run is: one frozen dataclass per group of fields, with units.

Optimizers and decays are in folders beside this file, one class each; train/config/tree.py says how configs are nested
and how fields are named. None in a field means that something is switched off or left to the machine. In `Model` alone
it means "as the preset has it": which fields there are, and their values, depends on the preset's family.
"""

import dataclasses
from typing import Annotated, Any, Literal

from train.config.decay import Decay
from train.config.decays.huber import Huber
from train.config.optimizer import Optimizer
from train.config.parts.width import Width
from train.config.ranges import Count, Momentum, NotNegative, Positive, Range, Share, Whole
from train.config.tree import Folder, flatten, nearest
from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    """The network: a preset, and changes to it. `--model.preset NAME --help` shows the fields of another family."""

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
    """Folder, file or glob of text; stdlib: the running Python's; zipf: made up; store:FOLDER: see tokenise;
    hf:FOLDER: parquet or arrow files of a Hugging Face data set."""
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
    workers: Annotated[int, Range(0, 512)] = 0
    """Processes that decode images; 0: threads, which gain up to six cores. The images are the same with any number."""
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
    deterministic: bool = False
    """Take kernels on GPUs that give the same bits in every run, and do not choose them by their time. This costs some
    speed. CPUs and TPUs always give the same bits."""
    migrate: bool = False
    """Go on with another optimizer or decay than the checkpoint's; says what of its state was kept."""
    restart: bool = False
    """Begin again at step 0 although the checkpoints of the run are lost; its records are kept aside."""
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
    decay: Annotated[Decay, Folder("train.config.decays")] = dataclasses.field(
        default_factory=Huber
    )
    """The weight decay."""
    width: Width | None = None
    """Scales from a narrower model; None: it does not."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    run: Run = dataclasses.field(default_factory=Run)


def preset_of(model: Model) -> Any:
    """The Config of models/ that a preset names.

    Raises:
        UserError: there is no such preset.
    """
    from train.step import families  # here, because it imports all models: --help does without

    if model.preset not in families.PRESETS:
        names = list(families.PRESETS)
        raise UserError(
            f"model.preset = {model.preset!r} does not exist; allowed are {', '.join(names)};"
            f" nearest: {nearest(model.preset, names)}."
        )
    return families.PRESETS[model.preset]


def model_config(config: Config, outputs: int = 1) -> Any:
    """The network of a config, a Config of models/, for so many tokens of a tokenizer, or classes.

    Raises:
        UserError: a shape that does not work out, or an embedding that is too small.
    """
    preset = preset_of(config.model)
    fields = _set(config.model, preset)
    rows = config.model.vocab_size or outputs
    if rows < outputs:
        raise UserError(
            f"model.vocab_size = {rows} is smaller than the tokenizer's {outputs} tokens;"
            f" nearest: {outputs}."
        )
    fields["vocab_size" if hasattr(preset, "vocab_size") else "classes"] = rows
    if config.width is not None:
        fields |= {"base_width": config.width.base, "base_head_width": config.width.base_head}
    try:
        return dataclasses.replace(preset, **fields)
    except ValueError as error:
        raise UserError(f"The model does not work out: {error}.") from None


def _set(model: Model, preset: Any) -> dict[str, Any]:
    """The fields of a preset that a config sets itself."""
    return {n: v for n, v in vars(model).items() if v is not None and hasattr(preset, n)}


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by name: (old, new). The preset's value of a field is no difference from None."""
    a, b = (_with_preset(config) for config in (old, new))
    return {
        name: (a.get(name, "absent"), b.get(name, "absent"))
        for name in {**a, **b}
        if a.get(name, "absent") != b.get(name, "absent")
    }


def _with_preset(config: Config) -> dict[str, Any]:
    values, preset = flatten(config), preset_of(config.model)
    known = {
        f"model.{name}": getattr(preset, name)
        for name, value in vars(config.model).items()
        if value is None and name != "vocab_size" and hasattr(preset, name)
    }
    return values | known
