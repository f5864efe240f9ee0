"""Every configuration key: its default, its meaning, its range, and whether it may change when a run goes on.

The one place all of this is written down (`key` in megahybrid/key.py), but for the keys of mixers, which stand in their
folders of megahybrid/mixers; a number is above 0 where nothing else is said.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from megahybrid.key import key
from megahybrid.mixers.kinds import KINDS, sections

FILE_NAMES = {
    "text": ["*.txt"],
    "jsonl": ["*.jsonl", "*.jsonl.gz", "*.jsonl.zst"],
    "parquet": ["*.parquet"],
    "npy": ["*.npy"],
    "bin": ["*.bin"],
}
"""Format of a source → the files that it takes where a recipe does not say."""

PROBES = ("position", "gain", "hits", "recall", "kept")
"""What `evaluate.probes` may name."""


@dataclass
class RunConfig:
    """Where a run lives."""

    dir: str = key(may_change=True)
    """The run directory: config.yaml, metrics.jsonl, status.json, checkpoints/, logs/, wandb/."""


@dataclass
class _Architecture:
    pattern: str = key()
    """One letter a layer, of megahybrid.mixers' kinds; (GL)*12 repeats, | begins a pipeline stage."""
    hidden_size: int = key()
    """Width of the residual stream."""
    vocab_size: int = key()
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    intermediate_size: int | None = key(
        None, otherwise=lambda model: 256 * math.ceil((8 * model.hidden_size // 3) / 256)
    )
    """Width inside the SwiGLU; 8/3 of hidden_size rounded up to a multiple of 256 when left out."""
    tie_embeddings: bool = key(True)
    """Share the embedding with the output layer."""
    norm_eps: float = key(1e-6)
    """Epsilon of every RMSNorm."""
    init_std: float = key(0.02, may_change=True)
    """Standard deviation of normal initialisation; the projections that write to the residual stream take it divided
    by sqrt(2 * layers)."""


ModelConfig = dataclasses.make_dataclass(
    "ModelConfig",
    [(name, section, field(default_factory=section)) for name, section in sections(KINDS).items()],
    bases=(_Architecture,),
    namespace={"__doc__": "The architecture, and the sections of all kinds of mixers.", "__module__": __name__},
)


@dataclass
class ParallelConfig:
    """How the model is split; the data parallel size follows from the number of processes."""

    tensor: int = key(1, may_change=True)
    """Tensor parallel size (by heads, channels and vocabulary)."""
    pipeline: int = key(1, may_change=True)
    """Pipeline parallel size (by layers)."""
    virtual_pipeline: int = key(1, may_change=True)
    """Model chunks a pipeline stage holds (interleaved schedule)."""
    sequence: bool = key(False, may_change=True)
    """Sequence parallelism: split the residual stream's tokens over the tensor parallel ranks."""
    context: int = key(1, may_change=True)
    """Context parallel size (by tokens of a micro-batch; where tokens meet they stay, or are exchanged for heads)."""
    zero_stage: int = key(1, may_change=True, choices=(1, 2, 3))
    """ZeRO stage: 1, 2 or 3."""
    gradient_reduction: str = key("fp32", may_change=True, choices=("fp32", "bf16"))
    """How gradients travel and are summed over the data parallel replicas: fp32, or bf16, at half the bytes."""

    @property
    def replica(self) -> int:
        """Processes of a data parallel replica."""
        return self.tensor * self.context * self.pipeline


@dataclass
class SkipConfig:
    """Steps that are left out: their update is dropped, they are counted, and many in a row stop the run.

    A step whose loss or gradient is not finite is always left out.
    """

    spikes: bool = key(False, may_change=True)
    """Also leave out steps whose loss or gradient norm stands out from the last ones."""
    sigma: float = key(6.0, may_change=True)
    """By how many standard deviations it has to stand out."""
    window: int = key(128, may_change=True)
    """Over how many accepted steps mean and deviation are taken; until then no spike is seen."""
    most_in_a_row: int = key(20, may_change=True)
    """More steps left out in a row stop the run."""


@dataclass
class WatchConfig:
    """When a run that makes no progress is ended, with the stack of every process in its log."""

    start_seconds: float = key(1800, may_change=True)
    """The longest that anything long may take: from the start to the end of the first step, a validation, a save."""
    step_seconds: float = key(480, may_change=True)
    """The longest that a step may take."""
    join_seconds: float = key(300, may_change=True)
    """How long processes wait for each other at the start."""
    restarts: int = key(3, may_change=True, at_least=0)
    """How often a job may be restarted from the same checkpoint before it is given up."""


@dataclass
class TraceConfig:
    """Traces of single steps (torch.profiler): what ran when, on the host and the GPU."""

    steps: list[int] = key([], may_change=True)
    """Steps of which each process of `ranks` writes a trace to RUN/traces, for chrome://tracing or ui.perfetto.dev. A
    traced step is slower, the first one most."""
    ranks: list[int] = key([0], may_change=True, at_least=0)
    """Processes, 0 first."""


@dataclass
class TrainConfig:
    """The training loop."""

    seq_length: int = key()
    """Tokens a sample."""
    micro_batch_size: int = key(may_change=True)
    """Samples a process handles at once."""
    global_batch_size: int = key()
    """Samples a step, over all processes and micro-batches."""
    steps: int = key(may_change=True)
    """Optimizer steps of the whole run."""
    seed: int = key(42, at_least=0)
    """Of initialisation, data order and dropout."""
    dtype: str = key("bf16", may_change=True, choices=("bf16", "fp32"))
    """bf16 (with fp32 master weights and gradient accumulation) or fp32."""
    recompute: str = key("none", may_change=True)
    """Layers that recompute their activations in the backward pass instead of keeping them: none, all, or the letters
    of their kinds in the pattern, such as LF."""
    cuda_graph: bool = key(False, may_change=True)
    """Whether the passes of a step are recorded once documents of the same lengths have come twice in a row, and
    replayed as one launch (a CUDA graph): for small models, whose launches take longer than their kernels. On one GPU
    alone; without recompute and ZeRO-3, nor for text with document_masking, whose lengths do not repeat. Their
    activations' memory is kept between steps."""
    z_loss: float = key(0.0, may_change=True, at_least=0)
    """Weight of the squared log of the softmax's normaliser (PaLM, arXiv 2204.02311, section 5)."""
    init_from: str | None = key(None, may_change=True)
    """A checkpoint (or run directory) whose weights a new run starts from, and what regulates them, such as lambda;
    nothing else of it is taken over: another seq_length, rope_theta or data make a stage of long context."""
    branch_from: str | None = key(None, may_change=True)
    """RUN@STEP, a run directory and the step of a checkpoint of it, with all of whose state a new run begins: it goes
    on as that run would, with its own checkpoints, metrics and W&B run."""
    branch_data: str = key("trunk", may_change=True, choices=("trunk", "own"))
    """What a branch reads. trunk: what its trunk would have read next. own: what its own data.* says, from the first
    sample on; other sources or weights to anneal on, say. The tokenizer is the trunk's."""
    resume_from: int | None = key(None, may_change=True)
    """The step of a checkpoint of this run to go back to, once a submission; later checkpoints are abandoned."""
    skip: SkipConfig = field(default_factory=SkipConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    validate_every: int = key(0, may_change=True, at_least=0)
    """Steps between two validations; 0 validates at the end only."""
    validation_samples: int = key(64, may_change=True)
    """Samples a validation reads, always the same ones."""
    log_every: int = key(10, may_change=True)
    """Steps between two lines on the terminal, and between two in metrics.jsonl with what mixers regulate and the
    GPU memory; all other values are in each of its lines."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate schedule."""

    learning_rate: float = key(3e-4, may_change=True)
    """Peak learning rate."""
    warmup_steps: int = key(0, may_change=True, at_least=0)
    """Steps of linear warm-up from 0."""
    schedule: str = key("cosine", may_change=True, choices=("cosine", "wsd", "constant"))
    """After the warm-up: cosine down to min_ratio; wsd, constant and then linear down to min_ratio; or constant."""
    decay_fraction: float = key(0.2, may_change=True, at_most=1)
    """Part of all steps in which wsd decays, rounded to whole steps."""
    min_ratio: float = key(0.1, may_change=True, at_least=0, at_most=1)
    """Learning rate at the end of cosine or wsd, as a part of the peak."""
    betas: tuple[float, float] = key((0.9, 0.95), may_change=True, at_least=0, below=1)
    """Decay rates of the moments."""
    eps: float = key(1e-15, may_change=True)
    """Added to the root of the second moment."""
    weight_decay: float = key(0.1, may_change=True, at_least=0)
    """Not applied to norms, biases and what else a mixer excepts."""
    clip_grad_norm: float = key(1.0, may_change=True)
    """Largest norm of the gradient; with a large one, such as 1e9, it is left as it is."""


@dataclass
class SourceConfig:
    """A folder of documents, or a task. When a run goes on the data has to be the same; how a source is read is
    compared with how that was prepared, not with the checkpoint."""

    path: str | None = key(None, may_change=True)
    """The folder, or a single file; not of a task."""
    format: str = key("text", may_change=True, choices=(*FILE_NAMES, "task"))
    """text: a file is a document; jsonl: a line of a file is one, also in .gz and .zst; parquet: a row is one; npy and
    bin: token ids of data.tokenizer, as numpy.save writes them or bare (or with llm.c's header); task: samples that
    are made while training, without end."""
    task: str | None = key(None)
    """task: its name in megahybrid.tasks."""
    parameters: dict[str, Any] = key({})
    """task: its parameters."""
    stages: list[Any] = key([])
    """task: other parameters for the first samples, such as [{until: 20000, length: 64}, {length: 512}]: each stage
    lasts until this source has given so many samples of train.seq_length in all, and the last one for ever."""
    include: list[str] = key([], may_change=True, otherwise=lambda source: list(FILE_NAMES.get(source.format, ())))
    """Glob patterns on the file name; *.txt, *.parquet, *.npy, *.bin, or *.jsonl with .gz and .zst, when left out."""
    exclude: list[str] = key([], may_change=True)
    """Folder names that are passed over wherever they stand."""
    weight: float | None = key(None, at_least=0)
    """Part of the training samples, relative to the other sources'; 0 leaves the source out. When no source says more
    than 0, each counts by its size. A task needs one."""
    dtype: str | None = key(None, may_change=True, choices=("uint16", "uint32"))
    """bin: what a token is stored as, uint16 or uint32."""
    eos_token_id: int | None = key(None, may_change=True, at_least=0)
    """npy, bin: the token that ends a document in the files; the tokenizer's document token when left out, which
    always begins or ends one."""
    field: str = key("text", may_change=True)
    """jsonl: the key of a line's text; parquet: the column."""


@dataclass
class DataConfig:
    """Text, tokenizer and shards."""

    path: str | None = key(None, may_change=True)
    """Where `prepare` writes the tokenizer and the shards, and `train` reads them; tasks alone need none."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Named sources; null in place of one removes what an included file has under its name."""
    tokenizer: str | None = key(None, may_change=True)
    """A tokenizer.json (or a folder that holds one); when left out, `prepare` trains a byte-level BPE of
    model.vocab_size on the sources."""
    workers: int | None = key(None, may_change=True)
    """Processes of `prepare`, as many as there are cores when left out; what it writes does not depend on it."""
    remote: str | None = key(None, may_change=True)
    """A copy of data.path that `train` reads instead, such as s3://bucket/folder, or a folder on a shared disk."""
    cache: str | None = key(None, may_change=True)
    """Where shards of data.remote are kept on every node: a folder on its own disk."""
    cache_limit: float | None = key(None, may_change=True)
    """GB that data.cache may hold (the oldest shards go first); no limit when left out."""
    identity: str | None = key(None, may_change=True)
    """The data that may be read, as `prepare` and `doctor` print it, in quotes; any when left out."""
    validation_fraction: float = key(0.005, may_change=True, at_least=0, below=1)
    """Part of the documents held out for validation (by a hash of a text file's name; in other formats of the
    document's text, so that it lies on the same side in all of them)."""
    document_masking: bool = key(True)
    """Documents packed into one sample do not see each other."""
    shuffle_block_size: int = key(16384)
    """Consecutive samples that are shuffled among each other; they come from shards in random order."""


@dataclass
class EvaluateConfig:
    """Probes of what the model recalls, on the way, always on the same samples."""

    every: int = key(0, may_change=True, at_least=0)
    """Steps between two times that the probes run, and they run after the last step; 0 for never."""
    probes: list[str] = key(list(PROBES), may_change=True, choices=PROBES)
    """position: loss by position in the document; gain: by how much tokens beyond the window lower the loss; hits: loss
    of tokens whose bigram occurred before, by distance; recall: answers of tasks, inside the window and beyond it;
    kept: whether heads hold what is asked for."""
    samples: int = key(64, may_change=True)
    """Validation samples that position, gain and hits read, the first ones; and samples of every task and length."""
    tasks: list[str] = key([], may_change=True)
    """Tasks of recall and kept, with the last parameters of a source of data.sources that has them; all of these
    sources' tasks when left out, or niah_single_1 where there are none and the tokenizer can write it."""
    lengths: list[int] = key([], may_change=True)
    """Tokens of their samples; a source's last length when left out, or train.seq_length."""
    window: int | None = key(None, may_change=True)
    """Keys, the query's own included, that count as near; the largest window of the model's layers when left out, or a
    quarter of train.seq_length where they have none, or see everything."""


@dataclass
class CheckpointConfig:
    """When to save."""

    every: int = key(1000, may_change=True)
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = key(2, may_change=True)
    """Newest checkpoints that stay on disk, and as many of those that a rollback abandons."""
    milestone_every: int = key(0, may_change=True, at_least=0)
    """Checkpoints whose step is a multiple of this stay for ever; 0 for none."""
    milestones: list[int] = key([], may_change=True)
    """Steps that are saved whatever `every`, and whose checkpoints stay for ever."""


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    wandb: str = key("offline", may_change=True, choices=("offline", "online", "disabled"))
    """offline, online or disabled."""
    project: str = key("megahybrid", may_change=True)
    """W&B project."""
    name: str | None = key(None, may_change=True)
    """W&B run name; the run directory's name when left out."""
    group: str | None = key(None, may_change=True)
    """W&B group, to find runs that belong together; the run's name when left out, shared by what a rollback began."""
    tags: list[str] = key([], may_change=True)
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
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
