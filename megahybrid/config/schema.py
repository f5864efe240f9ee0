"""Every configuration key, its default and its meaning: the one place they are written down."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class RunConfig:
    """Where a run lives."""

    dir: str = MISSING
    """The run directory: config.yaml, metrics.jsonl, status.json, checkpoints/, logs/, wandb/."""


@dataclass
class GDNConfig:
    """Gated DeltaNet (pattern letter G)."""

    num_heads: int = 8
    """Heads of queries, keys and values."""
    head_dim: int = 128
    """Channels of a query or key head."""
    value_head_dim: int | None = None
    """Channels of a value head; head_dim when left out."""
    conv_size: int = 4
    """Taps of the causal short convolution on q, k and v."""


@dataclass
class AttentionConfig:
    """Softmax attention: full (F), sliding window (S), and the heads of LTE (L)."""

    num_heads: int = 16
    """Query heads."""
    num_kv_heads: int | None = None
    """Key-value heads; num_heads when left out."""
    head_dim: int = 64
    """Channels of a head."""
    window_size: int = 1024
    """Keys that a sliding-window query (S) sees, itself included."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""


@dataclass
class RetentionLossConfig:
    """The L1 term on retention scores and the controller of its weight lambda (method: multiplicative, per head)."""

    update_interval: int = 32
    """Optimizer steps between two updates of lambda."""
    initial: float = 1e-9
    """First non-zero lambda; a lambda that would fall below it becomes 0."""
    maximum: float = 1.0
    """Largest lambda."""
    increase: float = 1.5
    """Factor on lambda while more tokens are kept than the buffer holds."""
    decrease: float = 2.0
    """Divisor of lambda while fewer are kept than tolerance * buffer_size."""
    tolerance: float = 0.95
    """Lambda rests while the kept count is between tolerance * buffer_size and buffer_size."""


@dataclass
class LTEConfig:
    """Sliding window attention with learnable token eviction (L); its heads are model.attention's."""

    window_size: int = 768
    """w: a query sees itself and the w tokens before it; older ones only if retained."""
    buffer_size: int = 512
    """b: retained tokens a head holds outside the window, sinks included; the target of the controller in training."""
    sink_size: int = 4
    """The first tokens of a document, always retained."""
    conv_size: int = 3
    """Taps of each of the router's three convolutions (odd)."""
    conv_dilation: int = 2
    """Dilation of the router's convolutions."""
    dropout: float = 0.1
    """Dropout before each of the router's convolutions, in training."""
    train_cap: bool = False
    """Train with the buffer's capacity enforced, as in inference, instead of leaving it to the L1 term alone."""
    loss: RetentionLossConfig = field(default_factory=RetentionLossConfig)
    """The L1 term and its controller."""


@dataclass
class ModelConfig:
    """The architecture."""

    pattern: str = MISSING
    """One letter a layer: G Gated DeltaNet, L LTE, S sliding window, F full attention; (GL)*12 repeats, | begins a
    pipeline stage."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    vocab_size: int = MISSING
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    intermediate_size: int | None = None
    """Width inside the SwiGLU; 8/3 of hidden_size rounded up to a multiple of 256 when left out."""
    tie_embeddings: bool = True
    """Share the embedding with the output layer."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of normal initialisation; the projections that write to the residual stream take it divided
    by sqrt(2 * layers)."""
    gdn: GDNConfig = field(default_factory=GDNConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    lte: LTEConfig = field(default_factory=LTEConfig)


@dataclass
class ParallelConfig:
    """How the model is split; the data parallel size follows from the number of processes."""

    tensor: int = 1
    """Tensor parallel size (by heads, channels and vocabulary)."""
    pipeline: int = 1
    """Pipeline parallel size (by layers)."""
    virtual_pipeline: int = 1
    """Model chunks a pipeline stage holds (interleaved schedule)."""
    sequence: bool = False
    """Sequence parallelism: split the residual stream's tokens over the tensor parallel ranks."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage."""
    gradient_reduction: str = "fp32"
    """How gradients travel and are summed over the data parallel replicas: fp32, or bf16, at half the bytes."""


@dataclass
class SkipConfig:
    """Steps that are left out: their update is dropped, they are counted, and many in a row stop the run.

    A step whose loss or gradient is not finite is always left out.
    """

    spikes: bool = False
    """Also leave out steps whose loss or gradient norm stands out from the last ones."""
    sigma: float = 6.0
    """By how many standard deviations it has to stand out."""
    window: int = 128
    """Over how many accepted steps mean and deviation are taken; until then no spike is seen."""
    most_in_a_row: int = 20
    """More steps left out in a row stop the run."""


@dataclass
class WatchConfig:
    """When a run that makes no progress is ended, with the stack of every process in its log."""

    start_seconds: float = 1800
    """The longest that anything long may take: from the start to the end of the first step, a validation, a save."""
    step_seconds: float = 480
    """The longest that a step may take."""
    join_seconds: float = 300
    """How long processes wait for each other at the start."""
    restarts: int = 3
    """How often a job may be restarted from the same checkpoint before it is given up."""


@dataclass
class TrainConfig:
    """The training loop."""

    seq_length: int = MISSING
    """Tokens a sample."""
    micro_batch_size: int = MISSING
    """Samples a process handles at once."""
    global_batch_size: int = MISSING
    """Samples a step, over all processes and micro-batches."""
    steps: int = MISSING
    """Optimizer steps of the whole run."""
    seed: int = 42
    """Of initialisation, data order and dropout."""
    dtype: str = "bf16"
    """bf16 (with fp32 master weights and gradient accumulation) or fp32."""
    recompute: str = "none"
    """Layers that recompute their activations in the backward pass instead of keeping them: none, all, or the letters
    of their kinds in the pattern, such as LF."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's normaliser (PaLM, arXiv 2204.02311, section 5)."""
    init_from: str | None = None
    """A checkpoint (or run directory) whose weights a new run starts from; nothing else of it is taken over."""
    resume_from: int | None = None
    """The step of a checkpoint of this run to go back to, once a submission; later checkpoints are abandoned."""
    skip: SkipConfig = field(default_factory=SkipConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    validate_every: int = 0
    """Steps between two validations; 0 validates at the end only."""
    validation_samples: int = 64
    """Samples a validation reads, always the same ones."""
    log_every: int = 10
    """Steps between two lines on the terminal, and between two in metrics.jsonl with the values of every head (kept
    tokens and lambda) and the GPU memory; all other values are in each of its lines."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate schedule."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    schedule: str = "cosine"
    """After the warm-up: cosine down to min_ratio; wsd, constant and then linear down to min_ratio; or constant."""
    decay_fraction: float = 0.2
    """Part of all steps in which wsd decays."""
    min_ratio: float = 0.1
    """Learning rate at the end of cosine or wsd, as a part of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moments."""
    eps: float = 1e-15
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Not applied to norms, biases, A_log and dt_bias."""
    clip_grad_norm: float = 1.0
    """Largest norm of the gradient."""


@dataclass
class SourceConfig:
    """A folder of documents."""

    path: str = MISSING
    """The folder."""
    format: str = "text"
    """text: a file is a document; jsonl: a line of a file is one, also in .gz and .zst; parquet: a row is one; npy and
    bin: token ids of data.tokenizer, as numpy.save writes them or bare (or with llm.c's header)."""
    include: list[str] = field(default_factory=list)
    """Glob patterns on the file name; *.txt, *.parquet, *.npy, *.bin, or *.jsonl with .gz and .zst, when left out."""
    exclude: list[str] = field(default_factory=list)
    """Folder names that are passed over wherever they stand."""
    weight: float | None = None
    """Part of the training samples, relative to the other sources'; 0 leaves the source out. When no source says more
    than 0, each counts by its size."""
    dtype: str | None = None
    """bin: what a token is stored as, uint16 or uint32."""
    eos_token_id: int | None = None
    """npy, bin: the token that ends a document in the files; the tokenizer's document token when left out, which
    always begins or ends one."""
    field: str = "text"
    """jsonl: the key of a line's text; parquet: the column."""


@dataclass
class DataConfig:
    """Text, tokenizer and shards."""

    path: str = MISSING
    """Where `prepare` writes the tokenizer and the shards, and `train` reads them."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Named sources of text."""
    tokenizer: str | None = None
    """A tokenizer.json (or a folder that holds one); when left out, `prepare` trains a byte-level BPE of
    model.vocab_size on the sources."""
    workers: int | None = None
    """Processes of `prepare`, as many as there are cores when left out; what it writes does not depend on it."""
    remote: str | None = None
    """A copy of data.path that `train` reads instead, such as s3://bucket/folder, or a folder on a shared disk."""
    cache: str | None = None
    """Where shards of data.remote are kept on every node: a folder on its own disk."""
    cache_limit: float | None = None
    """GB that data.cache may hold (the oldest shards go first); no limit when left out."""
    identity: str | None = None
    """The data that may be read, as `prepare` and `doctor` print it, in quotes; any when left out."""
    validation_fraction: float = 0.005
    """Part of the documents held out for validation (by a hash of a text file's name; in other formats of the
    document's text, so that it lies on the same side in all of them)."""
    document_masking: bool = True
    """Documents packed into one sample do not see each other."""
    shuffle_block_size: int = 16384
    """Consecutive samples that are shuffled among each other; they come from shards in random order."""


@dataclass
class CheckpointConfig:
    """When to save."""

    every: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that stay on disk, and as many of those that a rollback abandons."""
    milestone_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever; 0 for none."""


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    wandb: str = "offline"
    """offline, online or disabled."""
    project: str = "megahybrid"
    """W&B project."""
    name: str | None = None
    """W&B run name; the run directory's name when left out."""
    group: str | None = None
    """W&B group, to find runs that belong together; the run's name when left out, shared by what a rollback began."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""


@dataclass
class Config:
    """A complete recipe."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
