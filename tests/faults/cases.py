"""The table of cases: how each dump is made, and what the diff must make of it."""

from dataclasses import dataclass, field

import numpy as np

import honest
import indices
import outside
import parallel
import precision
import scale
from kernel import BF16, F32, Kernel, Trainer

GRADIENTS = ("d_hidden", "d_unembedding")
SCALARS = ("loss", "lse", "label_logits")


@dataclass
class Case:
    name: str
    causes: list  # none: the diff must agree
    kernel: type = Kernel
    trainers: tuple = (Trainer,)  # several: each process recorded what its own trainer computed
    regime: str = "unit"
    tokens: tuple = (120, 96)
    hidden: int = 32
    vocab: int = 360
    masked: float = 0.1
    weights: bool = False
    loss: dict = field(default_factory=dict)
    record: tuple = GRADIENTS
    parts: bool = False
    accumulated: bool = True
    output: type = F32
    stored: type = BF16
    processes: int = 1
    split: str = "tokens"
    layout: str = "vd"
    batch: int = None
    contract: dict = None
    prepare: object = None  # changes K and the microbatches once they are drawn
    parameters: tuple = ()  # ways to give them, each of names with the values that are right; none: any
    alike: dict = field(default_factory=dict)  # other causes that are right or may be listed beside the right one: why


CASES = []
RANDOM = 150  # honest cases made by chance


def healthy(name, **options):
    CASES.append(Case(f"healthy-{name}", [], **options))


def unknown(name, **options):
    CASES.append(Case(f"unknown-{name}", ["unknown"], **options))


def fault(slug, variant="", **options):
    CASES.append(Case(f"{slug}-{variant}" if variant else slug, [slug], **options))


def kernel(base=Kernel, **members):
    return type("", (base,), {k: staticmethod(v) if callable(v) else v for k, v in members.items()})


def same_tail(length, tile):
    """The tile sizes that leave the same tail."""
    first = length // tile * tile
    return [t for t in range(1, length) if length // t * t == first]


def same_last(length, tile):
    """The tile sizes whose last tile, whole or not, is the same."""
    first = (length - 1) // tile * tile
    return [t for t in range(1, length) if (length - 1) // t * t == first]


EVERYTHING = {"logit_softcap": 8.0, "z_loss": 1e-3, "label_smoothing": 0.1, "logit_scale": 0.7}


def all_masked(k, microbatches):
    for m in microbatches:
        m["targets"][:] = -100


def second_masked(k, microbatches):
    microbatches[1]["targets"][:] = -100


# Honest kernels.

healthy("f32", record=SCALARS + GRADIENTS)
healthy("f32-token-major", kernel=kernel(token_major=True, token_tile=17, vocab_tile=40))
healthy("f32-one-tile", kernel=kernel(token_tile=1000, vocab_tile=1000), regime="trained")
healthy("f32-thin-tiles", kernel=kernel(token_tile=3, vocab_tile=5), tokens=(40,), vocab=100)
healthy("f32-parts", kernel=honest.Apart, parts=True, regime="trained")
healthy("bf16-dlogits-joint", kernel=honest.Joint16, regime="trained")
healthy("bf16-dlogits-apart", kernel=honest.Apart16, regime="trained")
healthy("bf16-dlogits-apart-small", kernel=honest.Apart16)
healthy("bf16-dlogits-apart-outputs", kernel=honest.Apart16, output=BF16, regime="trained")
healthy("bf16-probabilities", kernel=honest.Probabilities16, loss={"cotangent": 3.0})
healthy("bf16-probabilities-large", kernel=honest.Probabilities16, regime="large", tokens=(300,))
healthy("bf16-probabilities-huge", kernel=honest.Probabilities16, regime="huge")
healthy("bf16-dlogits-joint-initial", kernel=honest.Joint16, regime="initial", tokens=(300,))
healthy("bf16-dlogits-joint-huge", kernel=honest.Joint16, regime="huge")
healthy("bf16-dlogits-apart-huge", kernel=honest.Apart16, regime="huge")
healthy("bf16-outputs", output=BF16, record=SCALARS + GRADIENTS)
healthy("bf16-dlogits-and-outputs", kernel=honest.Joint16, output=BF16)
healthy("bf16-cotangent", trainers=(honest.RoundedCotangent,), output=BF16, regime="trained")
healthy("bf16-cotangent-initial", trainers=(honest.RoundedCotangent,), regime="initial", loss={"cotangent": 0.3})
healthy("bf16-cotangent-offset", trainers=(honest.RoundedCotangent,), output=BF16, regime="offset", loss={"cotangent": 0.3})
healthy("one-token", tokens=(1,), masked=0, record=SCALARS + GRADIENTS)
healthy("one-token-bf16", tokens=(1, 1), masked=0, kernel=honest.Joint16, output=BF16)
healthy("all-masked", prepare=all_masked, record=SCALARS + GRADIENTS)
healthy("one-microbatch-masked", prepare=second_masked, loss={"microbatches": "global"})
healthy("small-cotangent", loss={"cotangent": 1e-6}, output=BF16, record=SCALARS + GRADIENTS)
healthy("power-of-two", loss={"cotangent": 0.25, "reduction": "sum"}, masked=0)
healthy("huge-logits", regime="huge", record=SCALARS + GRADIENTS)
healthy("huge-logits-bf16", regime="huge", kernel=honest.Joint16, output=BF16)
healthy("offset", regime="offset", record=SCALARS + GRADIENTS)
healthy("initial", regime="initial", record=SCALARS + GRADIENTS)
healthy("valid-vocab", loss={"valid_vocab": 341}, record=SCALARS + GRADIENTS)
healthy("valid-vocab-one", loss={"valid_vocab": 1}, tokens=(30,))
healthy("options", loss=EVERYTHING, regime="large", record=SCALARS + GRADIENTS)
healthy("options-apart", loss=EVERYTHING, regime="large", kernel=honest.Apart, weights=True)
healthy("options-bf16", loss=EVERYTHING, regime="trained", kernel=honest.Joint16, output=BF16, weights=True)
healthy("global", loss={"microbatches": "global"}, weights=True, tokens=(70, 120, 33))
healthy("step-gradients", loss={"microbatch_gradients": "step", "denominator": "tokens"})
healthy("given-denominator", loss={"microbatches": "sum", "denominator": 50.0})
healthy("dv-and-batch", layout="dv", batch=4)
healthy("float32-inputs", stored=F32)
healthy("vocab-parallel", trainers=(parallel.VocabParallel,), processes=2, split="vocab")
healthy("data-parallel", trainers=(parallel.DataParallel,), processes=3, output=BF16)

for i in range(RANDOM):
    healthy(f"random-{i:03}", **honest.options(np.random.default_rng(i)))

# Precision.

fault("label-logit-bf16", kernel=precision.LabelLogitBf16, record=SCALARS + GRADIENTS, regime="trained")
fault("label-logit-bf16", "products", kernel=precision.LabelLogitProductsBf16, record=SCALARS + GRADIENTS, regime="large")
fault("label-logit-bf16", "once", kernel=precision.LabelLogitOnceBf16, record=("loss",) + GRADIENTS, regime="trained")
fault("label-logit-bf16", "running-sum", kernel=precision.LabelLogitRunningSumBf16, record=SCALARS + GRADIENTS, regime="unit",
      parameters=({"rounded": ["running-sum"]},))
fault("loss-subtract-bf16", kernel=precision.LossSubtractBf16, record=SCALARS + GRADIENTS, regime="offset")
fault("loss-subtract-bf16", "loss-alone", kernel=precision.LossSubtractBf16, record=("loss",) + GRADIENTS, regime="trained")
fault("lse-bf16", kernel=precision.LseBf16, record=SCALARS + GRADIENTS)
fault("lse-bf16", "gradients-alone", kernel=precision.LseBf16, output=BF16, regime="large")
fault("lse-bf16", "recorded", kernel=precision.LseBf16Recorded, record=SCALARS + GRADIENTS, regime="trained")
fault("lse-bf16", "loss-too", kernel=precision.LseBf16Everywhere, record=SCALARS + GRADIENTS, regime="large",
      parameters=({"seen_by": ["loss"]},))
fault("label-scatter-bf16", kernel=precision.ScatterBf16, regime="trained",
      parameters=({"hits_rounded": [True], "onto": ["zeros, then the lse part in f32"]},))
fault("label-scatter-bf16", "onto-lse-part", kernel=precision.ScatterBf16Onto, output=BF16, tokens=(300,), masked=0,
      parameters=({"hits_rounded": [True], "onto": ["the lse part"]},))
fault("label-scatter-bf16", "hits-exact", kernel=precision.ScatterBf16HitsExact, output=BF16, tokens=(300,),
      parameters=({"hits_rounded": [False], "onto": ["the lse part"]},))
fault("label-scatter-bf16", "parts", kernel=precision.ScatterBf16, parts=True, parameters=({"hits_rounded": [True]},))
fault("label-grad-rounded", kernel=precision.LabelGradRounded, contract={"dlogits": "f32"}, regime="unit")
fault("label-grad-rounded", "parts", kernel=precision.LabelGradRounded, parts=True, contract={"dlogits": "f32"})
fault("dk-parts-rounded", kernel=precision.DkPartsRounded, output=BF16, regime="trained", tokens=(300,), vocab=60)
fault("gq-bf16", kernel=precision.GqBf16, contract={"dlogits": "f32"})
fault("dlogits-bf16", "joint", kernel=honest.Joint16, contract={"dlogits": "f32"}, regime="trained")
fault("dlogits-bf16", "apart", kernel=honest.Apart16, contract={"dlogits": "f32"}, regime="trained")
fault("logits-bf16-forward", kernel=precision.LogitsBf16Forward, regime="large", record=SCALARS + GRADIENTS)
fault("logits-bf16-backward", kernel=precision.LogitsBf16Backward, regime="large", record=SCALARS + GRADIENTS)
fault("logits-bf16-both", kernel=precision.LogitsBf16Both, regime="large", record=SCALARS + GRADIENTS)
fault("logits-bf16-both", "gradients-alone", kernel=precision.LogitsBf16Both, regime="large")
fault("dk-accumulate-bf16", "equal", kernel=precision.dk_in_chunks(8, False), tokens=(128,), output=BF16,
      parameters=({"chunks": [16], "parts_rounded": [False]},))
fault("dk-accumulate-bf16", "parts", kernel=precision.dk_in_chunks(15, True), tokens=(120, 120), output=BF16,
      parameters=({"chunks": [8], "parts_rounded": [True]},))
fault("dk-accumulate-bf16", "ragged", kernel=precision.dk_in_chunks(16, True), tokens=(120, 120), output=BF16,
      parameters=({"chunks": [8], "parts_rounded": [True]}, {"width": [16], "parts_rounded": [True]}))
fault("dk-accumulate-bf16", "unequal-microbatches", kernel=precision.dk_in_chunks(16, True), tokens=(128, 96), output=BF16,
      parameters=({"width": [16], "parts_rounded": [True]},))
fault("dk-accumulate-bf16", "microbatches", trainers=(precision.DkOverMicrobatches,), tokens=(40,) * 8,
      parameters=({"over": ["microbatches"]},))
fault("dk-accumulate-bf16", "microbatches-parts", trainers=(precision.DkOverMicrobatchesParts,), tokens=(40,) * 8, output=BF16,
      parameters=({"over": ["microbatches"]},))
fault("dk-accumulate-bf16", "processes", trainers=(parallel.dk_reduced_in_bf16(8),), processes=8, tokens=(240,), output=BF16,
      parameters=({"chunks": [8], "parts_rounded": [True]},))
fault("dk-accumulate-bf16", "three-processes", trainers=(parallel.dk_reduced_in_bf16(3),), processes=3, tokens=(240,),
      parameters=({"chunks": [3], "parts_rounded": [True]},))
fault("dq-accumulate-bf16", "equal", kernel=precision.dq_in_tiles(32, False), vocab=384, output=BF16,
      parameters=({"tiles": [12], "parts_rounded": [False]}, {"width": [32], "parts_rounded": [False]}))
fault("dq-accumulate-bf16", "ragged", kernel=precision.dq_in_tiles(16, True), vocab=360, output=BF16,
      parameters=({"tiles": [23], "parts_rounded": [True]}, {"width": [16], "parts_rounded": [True]}))
fault("prob-minus-one-bf16", kernel=precision.ProbMinusOneBf16, regime="trained", contract={"dlogits": "f32"})
fault("gradient-filter", kernel=precision.gradient_filter(2**-8, 16, 16), regime="large", tokens=(128,), vocab=384,
      parameters=({"token_tile": [16], "vocab_tile": [16], "masked": ["count"]},))
fault("gradient-filter", "oblong", kernel=precision.gradient_filter(2**-6, 16, 32), regime="large", tokens=(128,), vocab=384)
fault("gradient-filter", "odd-threshold", kernel=precision.gradient_filter(0.0137, 16, 32), regime="large", tokens=(192, 128),
      vocab=384, masked=0, parameters=({"token_tile": [16], "vocab_tile": [32]},))
fault("approximate-exp-log", "exp", kernel=precision.ApproximateExp, record=SCALARS + GRADIENTS)
fault("approximate-exp-log", "log", kernel=precision.ApproximateLog, record=SCALARS + GRADIENTS)

# Masks, tiles, indices.

fault("vocab-pad-unmasked", kernel=indices.pad_unmasked(128), regime="initial", record=SCALARS + GRADIENTS,
      parameters=({"pad": [24]},))
fault("vocab-pad-unmasked", "gradients-alone", kernel=indices.pad_unmasked(512), parameters=({"pad": [152]},))
fault("vocab-tail-dropped", kernel=indices.vocab_tail_dropped(128), parameters=({"tile": same_tail(360, 128)},))
fault("vocab-tail-dropped", "bf16", kernel=indices.vocab_tail_dropped(100), output=BF16, record=("loss",) + GRADIENTS,
      parameters=({"tile": same_tail(360, 100)},))
fault("token-tail-dropped", kernel=indices.token_tail_dropped(64), tokens=(120, 96),
      parameters=({"tile": [64]},))
fault("token-tail-dropped", "unequal-microbatches", kernel=indices.token_tail_dropped(64), tokens=(120, 200),
      parameters=({"tile": [64]},))
fault("token-tail-dropped", "odd", kernel=indices.token_tail_dropped(50), tokens=(120, 96), parameters=({"tile": [50]},))
fault("token-tail-dropped", "one-microbatch", kernel=indices.token_tail_dropped(48), tokens=(120,),
      parameters=({"tile": same_tail(120, 48)},))
fault("lse-tile-missing", kernel=indices.lse_tile_missing(64, -1), record=SCALARS + GRADIENTS,
      parameters=({"tile": same_last(360, 64)},))
fault("lse-tile-missing", "inner", kernel=indices.lse_tile_missing(64, 2), regime="initial",
      parameters=({"tile": [64], "index": [2]},))
fault("label-tile-edge", "first", kernel=indices.label_tile_edge(16, False), tokens=(300,), parameters=({"tile": [16]},))
fault("label-tile-edge", "last", kernel=indices.label_tile_edge(16, True), tokens=(300,), parameters=({"tile": [16]},))
fault("label-off-by-one", "right", kernel=indices.label_off_by_one(1))
fault("label-off-by-one", "left", kernel=indices.label_off_by_one(-1), record=SCALARS + GRADIENTS, output=BF16)
fault("label-missing", kernel=indices.LabelMissing, record=GRADIENTS)
fault("label-missing", "huge", kernel=indices.LabelMissing, regime="trained", output=BF16)
fault("ignored-leak", "stored-label", trainers=(indices.IgnoredLeak,), loss={"ignore_index": 3})
fault("ignored-leak", "label-zero", trainers=(indices.IgnoredLeakAsZero,))
fault("ignored-leak", "no-label", trainers=(indices.IgnoredLeak,), regime="trained")
fault("valid-vocab-ignored", trainers=(indices.ValidVocabIgnored,), loss={"valid_vocab": 300}, record=SCALARS + GRADIENTS)
fault("valid-vocab-ignored", "backward", trainers=(indices.ValidVocabIgnoredBackward,), loss={"valid_vocab": 300})

# Scale and reduction.

ONE = "a constant factor on both gradients may be several scale faults"

fault("dq-cotangent-missing", "cotangent", trainers=(scale.cotangent_missing(True, "cotangent"),), loss={"cotangent": 8.0},
      parameters=({"factor": [1 / 8]},))
fault("dq-cotangent-missing", "all", trainers=(scale.cotangent_missing(True, "all"),), loss={"denominator": 77.0, "cotangent": 4.0})
fault("dk-cotangent-missing", "cotangent", trainers=(scale.cotangent_missing(False, "cotangent"),), loss={"cotangent": 1024.0},
      parameters=({"factor": [1 / 1024]},), output=BF16)
fault("dk-cotangent-missing", "denominator", trainers=(scale.cotangent_missing(False, "denominator"),), masked=0.3)
fault("mean-over-all-tokens", trainers=(scale.MeanOverAllTokens,), masked=0.3, tokens=(120, 97))
fault("mean-over-all-tokens", "one-microbatch", trainers=(scale.MeanOverAllTokens,), masked=0.3, tokens=(120,), output=BF16,
      alike={"not-averaged": ONE})
fault("mean-of-means", trainers=(scale.MeanOfMeans,), loss={"microbatches": "global"}, tokens=(120, 60, 30))
fault("mean-of-means", "weights", trainers=(scale.MeanOfMeans,), loss={"microbatches": "global"}, weights=True, output=BF16)
fault("not-averaged", "devices", trainers=(scale.not_averaged(8),), parameters=({"factor": [8]},))
fault("not-averaged", "twice", trainers=(scale.not_averaged(0.25),), parameters=({"factor": [0.25]},), output=BF16)
fault("not-averaged", "microbatches", trainers=(scale.NotDividedByMicrobatches,), tokens=(60, 50, 40),
      parameters=({"factor": [3], "over": ["microbatches"]},))
fault("last-microbatch-only", trainers=(scale.LastMicrobatchOnly,), tokens=(60, 50, 40))
fault("first-cotangent-for-all", trainers=(scale.FirstCotangentForAll,), weights=True, loss={"reduction": "sum"}, masked=0)
fault("first-cotangent-for-all", "mean", trainers=(scale.FirstCotangentForAll,), weights=True, masked=0, output=BF16)
fault("token-weights-ignored", trainers=(scale.TokenWeightsIgnored,), weights=True)
fault("token-weights-ignored", "sum", trainers=(scale.TokenWeightsIgnored,), weights=True, loss={"reduction": "sum"}, output=BF16)
fault("softcap-derivative-missing", kernel=scale.SoftcapDerivativeMissing, loss={"logit_softcap": 10.0}, regime="large")
fault("softcap-derivative-missing-label", kernel=scale.SoftcapDerivativeMissingLabel, loss={"logit_softcap": 10.0}, regime="large")
fault("zloss-gradient-missing", kernel=scale.ZlossGradientMissing, loss={"z_loss": 1e-2}, record=SCALARS + GRADIENTS)
fault("label-smoothing-ignored", trainers=(scale.LabelSmoothingIgnored,), loss={"label_smoothing": 0.1}, output=BF16)
fault("logit-scale-ignored", "chain-factor", kernel=scale.LogitScaleFactorMissing, loss={"logit_scale": 0.3},
      alike={"not-averaged": ONE})
fault("logit-scale-ignored", "as-if-one", trainers=(scale.LogitScaleIgnored,), loss={"logit_scale": 0.3}, record=SCALARS + GRADIENTS)
fault("logit-scale-ignored", "stale-lse", trainers=(scale.LogitScaleIgnoredStaleLse,), loss={"logit_scale": 0.3})

# Parallel.

fault("dq-not-reduced", trainers=(parallel.one_shards_dq(4, 1),), parameters=({"shards": [4], "shard": [1]},))
fault("dq-not-reduced", "three", trainers=(parallel.one_shards_dq(3, 1),), parameters=({"shards": [3], "shard": [1]},))
fault("dq-not-reduced", "seven", trainers=(parallel.one_shards_dq(7, 4),), output=BF16,
      parameters=({"shards": [7], "shard": [4], "split": ["even"]},))
fault("dq-not-reduced", "twelve", trainers=(parallel.one_shards_dq(12, 11),), parameters=({"shards": [12], "shard": [11]},))
fault("dq-not-reduced", "copies", trainers=(parallel.one_shards_dq(2, 0), parallel.one_shards_dq(2, 1)), processes=2,
      split="vocab", parameters=({"shards": [2]},))
fault("dk-not-reduced", trainers=(parallel.one_processes_dk(4, 2),), tokens=(96, 96), parameters=({"shards": [4], "shard": [2]},))
fault("dk-not-reduced", "unequal", trainers=(parallel.one_processes_dk(4, 2),), parameters=({"shards": [4], "shard": [2]},))
fault("dk-not-reduced", "five", trainers=(parallel.one_processes_dk(5, 0),), tokens=(97, 96), output=BF16,
      parameters=({"shards": [5], "shard": [0], "split": ["even"]},))
fault("dk-not-reduced", "copies", trainers=(parallel.one_processes_dk(2, 0), parallel.one_processes_dk(2, 1)), processes=2,
      tokens=(96, 96), parameters=({"shards": [2]},))
fault("local-lse", trainers=(parallel.local_lse(4),), parameters=({"shards": [4]},))
fault("local-lse", "two", trainers=(parallel.local_lse(2),), processes=2, split="vocab", output=BF16, record=("loss",) + GRADIENTS,
      parameters=({"shards": [2]},))
fault("local-lse", "three", trainers=(parallel.local_lse(3),), output=BF16, parameters=({"shards": [3]},))
fault("local-lse", "seven", trainers=(parallel.local_lse(7),), regime="trained", parameters=({"shards": [7], "split": ["even"]},))
fault("label-per-shard", "three", trainers=(parallel.label_per_shard(3, True),), parameters=({"shards": [3], "of": ["both"]},))
fault("label-per-shard", "dk-alone", trainers=(parallel.label_per_shard(6, True, False),), output=BF16,
      parameters=({"shards": [6], "of": ["dk"]},))
fault("label-per-shard", "both", trainers=(parallel.label_per_shard(2, True),), processes=2, split="vocab",
      parameters=({"shards": [2]},))
fault("label-per-shard", "dq-alone", trainers=(parallel.label_per_shard(4, False),), parameters=({"shards": [4]},))

# Two at once.

CASES.append(Case("pair-tail-and-cotangent", ["vocab-tail-dropped", "dk-cotangent-missing"],
                  kernel=indices.vocab_tail_dropped(128), trainers=(scale.cotangent_missing(False, "cotangent"),),
                  loss={"cotangent": 8.0}))
CASES.append(Case("pair-scatter-and-softcap", ["softcap-derivative-missing", "label-scatter-bf16"],
                  kernel=type("", (scale.SoftcapDerivativeMissing, precision.ScatterBf16), {}),
                  loss={"logit_softcap": 10.0}, regime="large"))

# Outside the catalogue.

unknown("rows-permuted-in-tile", kernel=outside.RowsPermutedInTile)
unknown("block-transposed", kernel=outside.BlockTransposed, output=BF16)
unknown("dropout-in-backward", kernel=outside.DropoutInBackward)
unknown("feature-column-zeroed", kernel=outside.FeatureColumnZeroed, record=SCALARS + GRADIENTS)
unknown("stale-weights", trainers=(outside.StaleWeights,), regime="trained")
unknown("tail-tile-shifted", kernel=outside.TailTileShifted)
unknown("rows-shifted", kernel=outside.RowsShifted, output=BF16)
unknown("probabilities-in-fp8", kernel=outside.ProbabilitiesInFp8, regime="trained")
unknown("hidden-of-another-microbatch", trainers=(outside.HiddenOfAnotherMicrobatch,), tokens=(96, 96))
unknown("clipped", kernel=outside.Clipped)
unknown("tile-sign-flipped", kernel=outside.TileSignFlipped)
