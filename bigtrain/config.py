"""The configuration: one tree of pydantic models, read once, validated once, passed down as it is.

Every key of a YAML file is a field here and nothing else is accepted. The tree is immutable and imports no torch, so
that a login node without it can check and launch a job. Reading files, includes and overrides, and turning what is
wrong into messages, is `configfile.py`; this file says what a run can be.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bigtrain.configlaunch import Launch, Restarts
from bigtrain.configsection import Count, Fraction, Positive, Section


class Run(Section):
    """Where a run lives: everything that it decides or produces goes into `folder`/`name`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run and of its folder."""
    folder: str = "runs"
    """Folder that holds the run folders."""


class Init(Section):
    """What the weights start from."""

    checkpoint: str | None = None
    """Start from the weights of this run or checkpoint folder, with a fresh optimizer (fine-tuning)."""
    weights: Literal["model", "ema"] = "model"
    """Which weights of that checkpoint: as trained, or their moving average."""


class Model(Section):
    """The shape of the transformer. Llama, GPT-2 and BERT are presets of these fields (configs/models/)."""

    vocab_size: Positive | None = None
    """Rows of the embedding; left out, the tokenizer's size rounded up to a multiple of 64 (tensor-core tiles)."""
    layers: Positive
    width: Positive
    """Width of the residual stream."""
    heads: Positive
    """Query heads."""
    kv_heads: Positive | None = None
    """Key and value heads (grouped-query attention); left out, as many as query heads."""
    head_dim: Positive | None = None
    """Width of one head; left out, width / heads."""
    mlp_width: Positive
    """Inner width of the MLP block."""
    max_positions: Positive
    """Longest sequence that the model is made for."""
    causal: bool = True
    """True for a decoder; False for an encoder whose positions see both sides."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    """Normalise the input of each block (pre: GPT-2, Llama) or the sum after it (post: BERT)."""
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    mlp: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu2"] = "swiglu"
    """swiglu, geglu and geglu_tanh are gated (two input projections); the others have one."""
    attention_bias: bool = False
    """Bias on the query, key, value and output projections."""
    mlp_bias: bool = False
    tied_embeddings: bool = False
    """The output head shares the embedding's weight."""
    embedding_norm: bool = False
    """Normalise the sum of the embeddings (BERT)."""
    token_types: Count = 0
    """Number of token-type embeddings (BERT: 2)."""
    head: Literal["linear", "transform"] = "linear"
    """transform: dense, GELU, norm and a vocabulary bias before the scores (BERT)."""
    dropout: Fraction = 0.0
    """Dropout on the embeddings, on attention's output and on the MLP's output."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights; residual outputs use init_std / sqrt(2 * layers)."""
    activation_checkpointing: Literal["none", "full"] | Annotated[int, Field(ge=2)] = "none"
    """Recompute no block in the backward pass, every block, or every n-th block (n = 2, 3, ...)."""

    @property
    def kv_heads_(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_dim_(self) -> int:
        return self.head_dim or self.width // self.heads

    @model_validator(mode="after")
    def _shape(self):
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; change one, or set head_dim")
        if self.heads % self.kv_heads_:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.positions == "rope" and self.head_dim_ % 2:
            raise ValueError(f"rotary positions need an even head_dim, found {self.head_dim_}")
        return self


class Data(Section):
    """Text, how it becomes tokens, and how tokens become sequences."""

    source: Literal["stdlib", "text", "jsonl"] = "stdlib"
    """stdlib: the source files of Python's own standard library; text: files or folders; jsonl: one object a line."""
    path: str | list[str] | None = None
    """Files or folders to read (text, jsonl)."""
    field: str = "text"
    """Field that holds the text (jsonl)."""
    tokenizer: str = "bpe"
    """bytes; bpe (byte-level, trained on this data); or the folder of a Hugging Face tokenizer."""
    bpe_vocab_size: Annotated[int, Field(ge=258)] = 4096
    """Size of the trained vocabulary: 256 bytes, the end-of-document and the mask token included."""
    folder: str = "data/stdlib"
    """Where the prepared shards are, or will be."""
    sequence_length: Positive
    """Tokens per training sequence."""
    document_mask: bool = True
    """Attention does not cross from one document into the next."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the documents held out, chosen by their hash."""
    shard_tokens: Positive = 1 << 27
    """Tokens per shard file."""

    @model_validator(mode="after")
    def _path(self):
        if self.source == "stdlib" and self.path is not None:
            raise ValueError("source stdlib takes no path; remove path or use source: text")
        if self.source != "stdlib" and not self.path:
            raise ValueError(f"source {self.source} needs path: a file, a folder or a list of them")
        return self


class EarlyStopping(Section):
    patience: Positive
    """Stop after this many evaluations in a row without improvement."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest fall of the validation loss that counts as an improvement."""


class Train(Section):
    """How long, in what batches. Give any two of global_batch, micro_batch and accumulation."""

    task: Literal["causal", "masked"] = "causal"
    """causal: predict the next token; masked: predict hidden tokens (BERT)."""
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens to predict (task masked)."""
    steps: Positive
    """Optimizer steps."""
    global_batch: Positive | None = None
    """Sequences per optimizer step, over all ranks."""
    micro_batch: Positive | None = None
    """Sequences per rank and forward pass."""
    accumulation: Positive | None = None
    """Forward passes per rank and optimizer step."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest L2 norm of the gradient; null: no clipping."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, kept in float32 and sharded as the optimizer is."""
    early_stopping: EarlyStopping | None = None
    skip_limit: Count = 3
    """Steps in a row that may be passed over because the gradient is not finite, or spikes, with the weights left as they were;
    one more ends the run."""
    spike: Annotated[float, Field(gt=1)] | None = None
    """Pass over a step whose gradient norm is this many times its moving average; null: none."""
    frozen: list[str] = []
    """Parameters that are not trained: names, or patterns such as `embedding.*` (shell style)."""
    seed: Count = 0
    log_every: Positive = 1
    """Steps between rows of metrics.jsonl; a step that was passed over always has one."""

    @model_validator(mode="after")
    def _two_of_three(self):
        if sum(v is not None for v in (self.global_batch, self.micro_batch, self.accumulation)) < 2:
            raise ValueError("give two of global_batch, micro_batch and accumulation; the third follows from the ranks")
        return self


class Optimizer(Section):
    name: Literal["adamw", "lion", "muon", "sgd", "rmsprop"] = "adamw"
    """muon: Muon on the matrices of the blocks, AdamW on the rest."""
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Applied to parameters of two and more dimensions, embeddings among them; not to norms and biases. Decoupled from the
    learning rate's gradient step in adamw, lion and muon; an L2 term of the gradient in sgd and rmsprop."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay of the moments (adamw, lion, and muon's AdamW part)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Fraction = 0.9
    """sgd, rmsprop, muon."""
    alpha: Fraction = 0.99
    """Decay of the squared gradient (rmsprop)."""
    adam_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of muon's AdamW part; left out: lr."""


class Schedule(Section):
    """Learning rate as a pure function of the step, as a share of optimizer.lr."""

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    warmup_steps: Count = 0
    """Steps of linear rise from zero."""
    decay_steps: Positive | None = None
    """Steps of the final fall (wsd); left out: a fifth of train.steps."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the learning rate at the end (linear, cosine, wsd)."""


class Zero(Section):
    """DeepSpeed ZeRO: 0 shards nothing, 1 the optimizer, 2 and the gradients, 3 and the weights."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory and step there."""
    bucket_bytes: Positive = 1 << 28
    """Size of a communication bucket, in bytes of gradients."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass still runs (GPU)."""


Backend = Literal["torch", "triton"]


class Kernels(Section):
    """Who computes the operators of a block and the loss: plain torch, or bigtrain's Triton kernels."""

    backend: Literal["auto", "torch", "triton"] = "auto"
    """For all of them; auto: triton on a GPU, torch elsewhere."""
    attention: Backend | None = None
    """For attention alone; left out: as `backend` says. The same below."""
    norm: Backend | None = None
    rope: Backend | None = None
    mlp: Literal["torch", "triton", "fused"] | None = None
    """fused: Triton, and the two projections of a gated MLP are one kernel with the activation in it: a layer keeps neither of
    them for its backward pass, which computes them again."""
    loss: Backend | None = None

    @property
    def choices(self) -> dict[str, str]:
        """The families that differ from `backend`."""
        return {name: value for name, value in self.model_dump(exclude={"backend"}).items() if value is not None}


class Checkpoint(Section):
    every: Positive | None = None
    """Steps between checkpoints; the last step is always saved. Left out: only the last."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints to keep."""
    keep_every: Positive | None = None
    """Also keep those whose step is a multiple of this."""
    keep_best: Literal["validation_loss", "perplexity", "bits_per_byte"] | None = None
    """Also keep the one with the lowest value of this metric, among those saved at a step that was evaluated."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training goes on; false: training waits for the disk."""
    on_error: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written (a full disk): warn and go on, or end the run. The last one must be written."""
    commit: Literal["rename", "file"] = "rename"
    """What makes a checkpoint count: the renaming of its folder, or, where a file system cannot rename a folder in one step (some
    object stores), its manifest, written last."""
    file_bytes: Positive = 1 << 32
    """A rank begins another file when one has grown to this size."""


class Evaluate(Section):
    every: Positive | None = None
    """Steps between evaluations on the held-out split; the last step is always evaluated."""
    sequences: Positive | None = 256
    """Held-out sequences per evaluation; null: all."""


class Generate(Section):
    """Text that the model writes at every evaluation, kept in samples.jsonl and in the report."""

    prompts: list[str] = []
    tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """0: always the likeliest token."""
    top_k: Count = 0
    """Keep the k likeliest tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens whose probabilities sum to p."""
    seed: Count = 0


class Tracking(Section):
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "bigtrain"


class Config(Section):
    run: Run = Run()
    init: Init = Init()
    model: Model
    data: Data
    train: Train
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies it fast, else fp32."""
    zero: Zero = Zero()
    kernels: Kernels = Kernels()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    generate: Generate = Generate()
    tracking: Tracking = Tracking()
    restarts: Restarts = Restarts()
    launch: Launch = Launch()


class Batch(Section):
    """The batch arithmetic for a number of ranks: `global_batch` sequences per step in `accumulation` passes of
    `micro_batch` sequences on each rank. Where it does not divide, the places left over hold sequences of weight zero."""

    global_batch: int
    micro_batch: int
    accumulation: int
    ranks: int


def batch_arithmetic(train: Train, ranks: int) -> Batch:
    """Work out the third of global_batch, micro_batch and accumulation.

    Raises ValueError when all three are given and contradict each other.
    """
    g, m, a = train.global_batch, train.micro_batch, train.accumulation
    if g is None:
        g = m * a * ranks
    elif m is None:
        m = math.ceil(g / (a * ranks))
    elif a is None:
        a = math.ceil(g / (m * ranks))
    elif math.ceil(g / (m * ranks)) != a:
        raise ValueError(
            f"global_batch {g} is not micro_batch {m} x accumulation {a} x {ranks} ranks = {m * a * ranks}; remove one of the three"
        )
    return Batch(global_batch=g, micro_batch=m, accumulation=a, ranks=ranks)


def problems(config: Config) -> list[tuple[str, str]]:
    """Rules that need more than one section: (key, what is wrong and what to do), empty when all is well."""
    found: list[tuple[str, str]] = []

    def problem(key: str, text: str) -> None:
        found.append((key, text))

    model, data, train, zero, optimizer = config.model, config.data, config.train, config.zero, config.optimizer
    if data.sequence_length > model.max_positions:
        problem(
            "data.sequence_length",
            f"{data.sequence_length} is longer than model.max_positions {model.max_positions}; lower it or raise that",
        )
    if train.task == "causal" and not model.causal:
        problem("train.task", "causal needs model.causal: true; use task: masked for an encoder")
    if train.task == "masked" and model.causal:
        problem("train.task", "masked needs model.causal: false; use task: causal for a decoder")
    # What each optimizer can do at each stage, tried by tests/distributed/test_optimizers.py, stands in docs/optimizers.md.
    if zero.offload_optimizer and zero.stage == 0:
        problem("zero.offload_optimizer", "needs zero.stage 1, 2 or 3: stage 0 shards nothing that could be offloaded")
    if optimizer.name == "muon" and train.clip is not None and zero.stage > 0:
        problem(
            "train.clip",
            "set it to null with optimizer muon at zero.stage 1 to 3: there DeepSpeed measures the norm of Muon's orthogonal update,"
            " which grows with the model, and clipping would scale the update away",
        )
    if config.schedule.warmup_steps >= train.steps:
        problem("schedule.warmup_steps", f"{config.schedule.warmup_steps} leaves nothing of train.steps {train.steps}")
    if config.schedule.name == "wsd" and config.schedule.warmup_steps + wsd_decay_steps(config) > train.steps:
        problem(
            "schedule.decay_steps",
            f"warmup_steps {config.schedule.warmup_steps} + decay_steps {wsd_decay_steps(config)} exceed train.steps {train.steps}",
        )
    if config.launch.min_nodes and (train.global_batch is None or (train.micro_batch and train.accumulation)):
        problem("launch.min_nodes", "fewer machines would make another batch; set train.global_batch, and micro_batch or accumulation only")
    if train.early_stopping and config.evaluate.every is None:
        problem("train.early_stopping", "needs evaluate.every: it looks at the validation loss")
    return found


def wsd_decay_steps(config: Config) -> int:
    """Steps of the final fall of the warmup-stable-decay schedule."""
    return config.schedule.decay_steps or max(1, config.train.steps // 5)


MAY_DIFFER_ON_RESUME = (
    # Where it runs and what is shown.
    "run", "launch", "restarts", "tracking", "generate", "evaluate", "checkpoint",
    # How the same batches are computed: equal up to the order of sums. The global batch itself is compared by the run.
    "zero", "kernels", "train.micro_batch", "train.accumulation", "train.global_batch", "train.log_every",
    "train.skip_limit", "model.activation_checkpointing",
)  # fmt: skip
"""Sections and keys in which a resumed run may differ from what it was."""


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree of mappings by their dotted keys."""
    if isinstance(value, dict):
        return {k: v for key, sub in value.items() for k, v in flat(sub, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def differences(old: Config, new: Config, ignore: tuple[str, ...] = ()) -> list[str]:
    """Keys in which two configs differ, as lines `key: old -> new`; `ignore` names keys and whole sections."""
    a, b = flat(old.model_dump()), flat(new.model_dump())
    keys = [k for k in {**a, **b} if not any(k == i or k.startswith(f"{i}.") for i in ignore)]
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in keys if a.get(k) != b.get(k)]
