"""The training loop: stages in order, each starting from, and taught by, the ones before.

A step reads nothing back from the device. Losses stay there until `log_every` steps are together, and are then reduced
over ranks and recorded at once. Randomness within a step is a function of (seed, stage, step, rank), so that a resumed
run continues bit for bit without saving the state of any generator.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsquant.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_float,
    load_model,
    load_run_checkpoint,
    restore,
    save_checkpoint,
)
from dsquant.checkpoint_weights import CheckpointWeights
from dsquant.config import SOFT_LABELS, RunConfig, StageConfig
from dsquant.convert import convert_run
from dsquant.data import StoredCrops, TrainStream
from dsquant.engine import Engine, World, serve
from dsquant.errors import CheckpointError, TrainingError
from dsquant.evaluation import METRICS, Scores, evaluate, score_name
from dsquant.heartbeat import Heartbeat
from dsquant.losses import block_loss, hidden_loss, stage_loss
from dsquant.models import Weights, build_model, insert_sites, model_outputs, open_weights, skeleton
from dsquant.nonfinite import first_nonfinite
from dsquant.preemption import Stopped, StopRequest
from dsquant.quant.calibrate import calibrate
from dsquant.run_data import (
    damage_of_all_ranks,
    eval_stream,
    images_per_batch,
    open_data,
    open_similar_tokens,
    open_tokenizer,
    train_stream,
)
from dsquant.telemetry.console import Console, closing_table
from dsquant.telemetry.metrics import METRICS_FILE, MetricsLog, write_summary
from dsquant.telemetry.report import write_report
from dsquant.telemetry.wandb_sink import WandbSink

PACKED_FILE = "model.packed.safetensors"
RESULTS = ("float_top1", "top1", "oscillating_pct", "oscillating_peak_pct")
BEST = ("best_step", "best_score")
CARRIED = ("skipped_steps", *BEST, *RESULTS, *METRICS, *(f"float_{metric}" for metric in METRICS))


def learning_rate(stage: StageConfig, step: int, total: int) -> float:
    """Return the rate of optimizer step `step` (from 0): linear warm-up, then a cosine to min_lr that the last step ends near."""
    warmup = round(stage.warmup * total)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    t = (step - warmup) / max(1, total - warmup)
    return stage.min_lr + 0.5 * (stage.lr - stage.min_lr) * (1 + math.cos(math.pi * t))


def seed_step(seed: int, *parts: object) -> None:
    """Seed torch's generators for one step on one rank."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass
class StepBuffer:
    """Keep per-step sums on the device until they are recorded: loss, right answers, images."""

    rows: list[Tensor]
    meta: list[tuple[int, float, bool]]
    began: float

    def add(self, step: int, lr: float, skipped: bool, sums: Tensor) -> None:
        self.rows.append(sums)
        self.meta.append((step, lr, skipped))


class Run:
    """Drive all stages of a recipe on this rank.

    Args:
        config: the checked recipe.
        ds_config: DeepSpeed's part.
        run_dir: where everything of the run lies, the same on every rank.
        world: this process among its peers.
        resume: continue from the newest whole checkpoint.
        stop: what has this run stop at the end of a step, of a batch of an evaluation or of a calibration; it then raises
            Stopped on every rank, and a run that resumes ends as one that was never stopped.
        heartbeat: learns where this rank is.
    """

    def __init__(
        self, config: RunConfig, ds_config: dict[str, Any], run_dir: Path, world: World, *, resume: bool = False,
        stop: StopRequest | None = None, heartbeat: Heartbeat | None = None,
    ):  # fmt: skip
        self.config, self.ds_config, self.run_dir, self.world = config, ds_config, run_dir, world
        self.main = world.rank == 0
        self.stop = stop or StopRequest()
        self.stop.join(world.size)
        self.heartbeat = heartbeat or Heartbeat()
        self._check_stages()
        self.train_shards, self.val_shards = open_data(config.data, run_dir, world.rank)
        self.stored_crops = StoredCrops.of_recipe(config, self.train_shards)
        self.tokenizer = open_tokenizer(config, run_dir, world.rank)
        self.similar = open_similar_tokens(config, run_dir, world)
        self.score = score_name(config.data)
        self.totals = {name: self._total_steps(stage) for name, stage in config.stages.items()}
        self.start = latest_checkpoint(run_dir, list(config.stages)) if resume else None
        if self.start and self.start.config.model != config.model:
            raise CheckpointError(
                f"{self.start.path} is of another model: {self.start.config.model} there and {config.model} here"
            )
        self.order_ranks = self.start.order_ranks if self.start else world.size
        self.summary: dict[str, Any] = {"skipped_steps": 0}
        self.began = time.monotonic()

    def _check_stages(self) -> None:
        """Raise ConfigError for a later stage's fault now, before an earlier one has trained for hours."""
        for stage in self.config.stages.values():
            images_per_batch(self.config, stage, self.world.size)
            if stage.quant is not None:
                with torch.random.fork_rng(devices=[]):
                    insert_sites(skeleton(self.config.model), stage.quant.policy(), stage.quant.grad_scale)

    def _total_steps(self, stage: StageConfig) -> int:
        if stage.steps == 0:
            return 0
        steps = stage.steps or max(1, round(stage.epochs * (self.train_shards.total // stage.batch_size)))
        return min(steps, self.config.max_steps or steps)

    def execute(self) -> dict[str, Any]:
        """Run every stage that is not done, convert the last, and return the summary."""
        stages = list(self.totals.items())
        self.console = Console(stages, enabled=self.main)
        self.metrics = self._open_metrics(stages) if self.main else None
        failed = True
        try:
            names = list(self.config.stages)
            first = names.index(self.start.stage) + self.start.done if self.start else 0
            self._recall(names[:first])
            for name in names[first:]:
                resumed = self.start if self.start and self.start.stage == name and not self.start.done else None
                self._stage(name, resumed)
            self._finish(names[-1])
            failed = False
        except Stopped:
            failed = False
            raise
        finally:
            self.console.close()
            if self.metrics:
                self.metrics.close(failed=failed)
        return self.summary

    def _open_metrics(self, stages: list[tuple[str, int]]) -> MetricsLog:
        telemetry = self.config.telemetry
        dump = self.config.model_dump(mode="json")
        sink = WandbSink(
            self.run_dir, dump, stages=stages, mode=telemetry.wandb, project=telemetry.project, name=self.run_dir.name
        )
        path, after = self.run_dir / METRICS_FILE, (self.start.stage, self.start.step) if self.start else None
        if path.exists():
            owed = self.start.owed if self.start else ()
            return MetricsLog.resume(path, [name for name, _ in stages], after, [sink], owed)
        return MetricsLog(path, [sink])

    def _recall(self, names: list[str]) -> None:
        """Take the results of stages that an earlier start of this run has finished from their checkpoints."""
        for name in names:
            self.summary |= load_run_checkpoint(self.run_dir, name).manifest.get("results", {})

    def _stage(self, name: str, resumed: Checkpoint | None) -> None:
        """Train one stage from its beginning or from a checkpoint, evaluate it, and keep its end."""
        stage, total = self.config.stages[name], self.totals[name]
        self.heartbeat.where = f"the start of stage {name}"
        model, weights = self._initial_model(stage)
        if stage.quant is not None and f"float_{self.score}" not in self.summary:
            self._note(self._evaluate_float(model, weights, stage), "float_")
        teacher = self._teacher(stage)
        engine = Engine(model, self.config, stage, self.ds_config, self.world, total, weights)
        del model, weights
        self.stream = stream = train_stream(
            self.config, stage, self.train_shards, self.stored_crops, self.tokenizer, self.similar, self.world,
            self.order_ranks,
        )  # fmt: skip
        for key in BEST:
            self.summary.pop(key, None)
        if resumed is not None:
            self.summary |= resumed.manifest.get("results", {})
            restore(engine, resumed)
        elif stage.quant is not None:
            self.summary.pop("oscillating_peak_pct", None)
            values = load_run_checkpoint(self.run_dir, stage.init_from).quant if stage.init_from else {}
            if stage.quant.calibration.inherit == "all":
                engine.inherit(values)
            else:
                self._calibrate(engine, stage, stream, values)
        self.console.begin_stage(name, total, engine.step_index)
        if self.metrics and resumed is None:
            self.metrics.write("stage", name, 0, event="begin", total=total, zero_stage=engine.zero_stage)
        if stage.quant is not None and resumed is None:
            self._record_evaluation(name, engine)
        self._train(name, stage, engine, stream, teacher, owed=resumed is not None and bool(resumed.owed))
        engine.destroy()
        if teacher is not None and self._partitions:
            teacher.destroy()

    @property
    def _partitions(self) -> bool:
        """Say whether models are built in parts, none of them whole on a rank: under ZeRO 3."""
        return self.ds_config.get("zero_optimization", {}).get("stage", 0) == 3

    def _initial_model(self, stage: StageConfig) -> tuple[nn.Module, Weights | None]:
        """Return a stage's float model with its weights, or a skeleton and where its weights come from."""
        earlier = load_run_checkpoint(self.run_dir, stage.init_from) if stage.init_from else None
        if self._partitions:
            weights = CheckpointWeights(earlier) if earlier else open_weights(self.config.model, self.config.seed)
            return skeleton(self.config.model), weights
        if earlier:
            return load_float(earlier), None
        torch.manual_seed(self.config.seed)  # every rank builds the same weights
        return build_model(self.config.model), None

    def _evaluate_float(self, model: nn.Module, weights: Weights | None, stage: StageConfig) -> dict[str, float | int]:
        """Evaluate a stage's float model before it is quantized; of a skeleton a second one, which is freed again."""
        if weights is None:
            return self._evaluate(model.to(self.world.device).eval(), torch.float32)
        served = serve(skeleton(self.config.model), weights, stage, self.ds_config, replace(self.world, bf16=False))
        found = self._evaluate(served, torch.float32)
        served.destroy()
        return found

    def _teacher(self, stage: StageConfig) -> nn.Module | None:
        if stage.distill is None or stage.distill.teacher == SOFT_LABELS:
            return None
        checkpoint = load_run_checkpoint(self.run_dir, stage.distill.teacher)
        if self._partitions:
            model, weights = CheckpointWeights.to_serve(checkpoint, self.world.device)
            return serve(model, weights, stage, self.ds_config, self.world)
        teacher = load_model(checkpoint).to(self.world.device)
        if self.world.bf16:
            teacher = teacher.bfloat16()
        return teacher.requires_grad_(False)

    def _calibrate(self, engine: Engine, stage: StageConfig, stream: TrainStream, earlier: dict[str, Tensor]) -> None:
        """Fit the activation quantizers on training samples, the first of the run's own stream; `earlier` may give biases."""
        self.console.message("calibrating activation quantizers on training samples ...")
        samples = []
        for inputs, *_ in islice(stream.batches(), stage.quant.calibration.batches):
            samples.append(inputs)
            self.stop.poll("calibration")
        engine.eval()

        def forward(inputs: Any) -> None:
            self.stop.poll("calibration")
            engine.evaluate_logits(inputs)

        how = stage.quant.calibration
        given = engine.inherit_biases(earlier) if how.inherit == "biases" else set()
        if how.weights == "least_squares":
            self.console.message("refitting linear layers to their quantized inputs ...")
            engine.refit(samples, how.init, given)
        calibrate(
            engine.sites.quantizers, engine.state, forward, samples, how.rounds,
            bind=lambda: engine.sites.bind(engine.state), init=how.init, sequential=how.sequential, given=given,
        )  # fmt: skip
        engine.train()
        engine.finish_calibration()

    def _train(
        self, name: str, stage: StageConfig, engine: Engine, stream: TrainStream, teacher: nn.Module | None, owed: bool
    ) -> None:
        total, every = self.totals[name], self.config.telemetry.log_every
        steps_per_epoch = max(1, self.train_shards.total // stage.batch_size)
        eval_every = max(1, round(stage.eval_every * steps_per_epoch))
        batches = stream.batches(engine.step_index * stage.gradient_accumulation)
        buffer = StepBuffer([], [], time.monotonic())
        engine.train()
        if total == 0:  # taken as it is, or as calibration leaves it, which is evaluated already
            if stage.quant is None:
                self._record_evaluation(name, engine)
            self._save(name, engine, done=True)
        elif owed:  # the checkpoint is of the middle of this step's end
            self._end_step(name, stage, engine, buffer, evaluates=True)
        while engine.step_index < total:
            lr = learning_rate(stage, engine.step_index, total)
            step = engine.step_index + 1
            last = step == total
            self.heartbeat.where = f"stage {name}, step {step}"
            evaluates = last or step % eval_every == 0
            observes = bool(engine.quantization) and (last or step % self.config.telemetry.oscillation_every == 0)
            taken = list(islice(batches, stage.gradient_accumulation))
            sums, skipped = self._step(name, stage, engine, taken, teacher, lr, observes)
            buffer.add(step, lr, skipped, sums)
            if engine.skipped_in_a_row > self.config.max_skipped:
                self._flush(name, stage, buffer)
                raise self._not_finite(name, stage, engine, taken, teacher, lr)
            if step % every == 0 or self._saves(step, total) or evaluates or observes:
                self._flush(name, stage, buffer)
            if observes:
                self._record_oscillation(name, engine)
            self._end_step(name, stage, engine, buffer, evaluates=evaluates)

    def _saves(self, step: int, total: int) -> bool:
        every = self.config.checkpoint.every_steps
        return step == total or bool(every and step % every == 0)

    def _end_step(self, name: str, stage: StageConfig, engine: Engine, buffer: StepBuffer, *, evaluates: bool) -> None:
        """Evaluate and save where a step ends with that, or stop here: then the checkpoint says what this step still owes.

        An evaluation that is stopped is done anew by the resumed run: it changes no weight, and nothing of it is recorded.
        """
        step, total = engine.step_index, self.totals[name]
        saves = self._saves(step, total)
        try:
            self.stop.poll("training")
            if evaluates:
                saves |= self._is_best(step, self._record_evaluation(name, engine))
        except Stopped as stopped:
            self._flush(name, stage, buffer)
            self._save(name, engine, done=False, owed=("eval", "checkpoint") if evaluates else ())
            raise Stopped(f"{stopped}: stage {name} is saved at step {step} of {total}") from None
        if saves:
            self._save(name, engine, done=step == total)
        if evaluates or saves:
            buffer.began = time.monotonic()

    def _step(
        self, name: str, stage: StageConfig, engine: Engine, taken: list[tuple[Any, ...]], teacher: nn.Module | None,
        lr: float, observe: bool = False,
    ) -> tuple[Tensor, bool]:  # fmt: skip
        """Take one optimizer step on `taken`, its micro-batches.

        Returns float64 (loss, right answers, samples) of this rank, on its device, and whether the step was skipped.
        """
        sums, step = torch.zeros(3, dtype=torch.float64, device=self.world.device), engine.step_index
        for micro, batch in enumerate(taken):
            loss, logits, labels = self._forward(name, stage, engine, batch, teacher, (step, micro))
            engine.backward(loss)
            with torch.no_grad():
                right = (logits.argmax(dim=-1) == labels).sum()
                sums += torch.stack(
                    [loss.detach().double() * len(labels), right.double(), right.new_tensor(len(labels))]
                )
            skipped = engine.step(lr, observe)
        return sums, skipped

    def _forward(
        self, name: str, stage: StageConfig, engine: Engine, batch: tuple[Any, ...], teacher: nn.Module | None,
        at: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return loss, logits and labels of a micro-batch; `at` is its step (from 0) and its number in it."""
        inputs, labels, *soft_labels = batch
        soft_labels = [tensor.to(self.world.device, non_blocking=True) for tensor in soft_labels]
        inputs, labels = engine.cast(inputs), labels.to(self.world.device, non_blocking=True)
        teacher_logits, distills_hidden = None, stage.distill is not None and stage.distill.hidden > 0
        if teacher is not None:
            with torch.no_grad():
                teacher_logits, taught = model_outputs(teacher, inputs, hidden=distills_hidden)
        seed_step(self.config.seed, name, *at, self.world.rank)
        logits, hidden = engine.outputs(inputs, hidden=distills_hidden)
        loss = stage_loss(logits, labels, teacher_logits, stage.distill, stage.label_smoothing, soft_labels)
        if distills_hidden:
            text = isinstance(inputs, dict)
            loss = loss + stage.distill.hidden * (
                hidden_loss(hidden, taught, inputs["attention_mask"]) if text else block_loss(hidden, taught)
            )
        return loss, logits, labels

    def _not_finite(
        self, name: str, stage: StageConfig, engine: Engine, taken: list[tuple[Any, ...]], teacher: nn.Module | None,
        lr: float,
    ) -> TrainingError:  # fmt: skip
        """Take a skipped step again, watched, and return the error that says where what is not finite begins."""
        step, where = engine.step_index, "nowhere when the step was taken again"
        for micro, batch in enumerate(taken):
            forward = partial(self._forward, name, stage, engine, batch, teacher, (step - 1, micro))
            mine = first_nonfinite(engine.module, batch[0], lambda run=forward: run()[0], engine.backward)
            found: list[str | None] = [None] * self.world.size
            dist.all_gather_object(found, mine)
            if ranks := [rank for rank, what in enumerate(found) if what]:
                size = stage.batch_size // self.world.size // stage.gradient_accumulation
                first = ((step - 1) * stage.gradient_accumulation + micro) * size
                where = f"in {found[ranks[0]]}, on rank {ranks[0]}, in samples {first} to {first + size - 1} that it has drawn"
                break
            engine.step(lr)
        return TrainingError(
            f"stage {name}: the loss or a gradient was not finite in {engine.skipped_in_a_row} steps in a row, the last of "
            f"them step {step} (max_skipped: {self.config.max_skipped}). It begins {where}. Look at these samples, or lower "
            f"lr ({stage.lr}) or scale_lr, or clip gradients (gradient_clipping); the last checkpoint is untouched"
        )

    def _flush(self, name: str, stage: StageConfig, buffer: StepBuffer) -> None:
        """Reduce the buffered steps over ranks and record them.

        Raises TrainingError where a loss is not finite and its step was taken.
        """
        if not buffer.rows:
            return
        together = torch.stack(buffer.rows)
        dist.all_reduce(together)
        seconds = time.monotonic() - buffer.began
        rate = len(buffer.rows) * stage.batch_size / max(seconds, 1e-9)
        for (step, lr, skipped), (loss, right, images) in zip(buffer.meta, together.tolist(), strict=True):
            loss, top1 = loss / images, None if self.score == "pearson_spearman" else 100 * right / images
            if self.metrics:
                mark = {"skipped": True} if skipped else {}
                self.metrics.write("train", name, step, loss=loss, lr=lr, top1=top1, images_per_second=rate, **mark)
            self.summary["skipped_steps"] += skipped
            if not math.isfinite(loss) and not skipped:
                raise TrainingError(
                    f"stage {name}: the loss of step {step} is {loss}; lower its lr ({stage.lr}) or scale_lr; "
                    "the last checkpoint is untouched"
                )
        self.console.update(step, loss=loss, top1=top1, images_per_second=rate)
        self.summary["images_per_second"] = rate
        buffer.rows, buffer.meta, buffer.began = [], [], time.monotonic()

    def _record_oscillation(self, name: str, engine: Engine) -> None:
        sites = engine.quantization.statistics()
        low = [s for s in sites.values() if s["n_bits"] <= 4] or list(sites.values())
        numel = sum(s["numel"] for s in low)
        totals = {k: sum(s[k] * s["numel"] for s in low) / numel for k in ("oscillating_pct", "frozen_pct")}
        peak = max(totals["oscillating_pct"], self.summary.get("oscillating_peak_pct", 0.0))
        self.summary |= {"oscillating_pct": totals["oscillating_pct"], "oscillating_peak_pct": peak}
        if self.metrics:
            self.metrics.write("oscillation", name, engine.step_index, sites=sites, **totals)

    def _is_best(self, step: int, score: float) -> bool:
        """Note a step whose score is the best of the stage so far, where that is to be kept."""
        best = self.config.checkpoint.keep_best and score > self.summary.get("best_score", -math.inf)
        self.summary |= {"best_step": step, "best_score": score} if best else {}
        return best

    def _record_evaluation(self, name: str, engine: Engine) -> float:
        """Evaluate, record what is found, and return the score."""
        self.heartbeat.where = f"stage {name}, the evaluation of step {engine.step_index}"
        engine.eval()
        found = self._evaluate(engine.module, engine.dtype)
        engine.train()
        self._note(found, "float_" if engine.quantization is None else "")
        if self.metrics:
            self.metrics.write("eval", name, engine.step_index, **found)
        self.console.message(
            f"{name} step {engine.step_index}: validation {self.score.replace('top1', 'top-1')} {found[self.score]:.2f}, "
            f"loss {found['loss']:.4f}"
        )
        return found[self.score]

    def _note(self, found: dict[str, float | int], prefix: str) -> None:
        """Put a model's top-1 (where it has one) and its score into the summary."""
        self.summary |= {prefix + name: found[name] for name in ("top1", self.score) if name in found}

    def _evaluate(self, model: nn.Module, dtype: torch.dtype) -> dict[str, float | int]:
        """Return loss, number of samples and scores over the whole validation set."""
        stream = eval_stream(self.config.data, self.val_shards, self.tokenizer, self.world)
        scores = Scores(self.config.data.metric, self.world.device)
        poll = partial(self.stop.poll, "evaluation")
        return evaluate(model, stream, scores, self.world.device, dtype, poll).result()

    def _save(self, name: str, engine: Engine, *, done: bool, owed: Sequence[str] = ()) -> None:
        damage = damage_of_all_ranks(self.stream)
        self.heartbeat.where = f"stage {name}, the checkpoint of step {engine.step_index}"
        if self.metrics:
            if damage:
                count = sum(len(entry["samples"]) for entry in damage)
                self.metrics.write("data", name, engine.step_index, damaged=count, damage=damage)
            self.metrics.flush()
        results = {k: v for k, v in self.summary.items() if k in CARRIED}
        path = save_checkpoint(
            self.run_dir, self.config, name, engine, done=done, results=results, owed=owed, order_ranks=self.order_ranks
        )
        self.summary["checkpoint"] = str(path)
        self.summary["zero_stage"] = engine.zero_stage
        if self.metrics:
            self.metrics.write("checkpoint", name, engine.step_index, path=str(path), done=done)

    def _finish(self, last: str) -> None:
        """Convert the last stage, and write and show the summary."""
        seconds = time.monotonic() - self.began
        if not self.main:
            return
        checkpoint = load_run_checkpoint(self.run_dir, last)
        numel = sum(torch.Size(shape).numel() for shape in checkpoint.manifest["shapes"].values())
        self.summary |= {
            "recipe": self.config.recipe,
            "world_size": self.world.size,
            "zero_stage": checkpoint.manifest["zero_stage"],
            "steps": sum(self.totals.values()),
            "seconds": seconds,
            "float_bytes": 4 * numel,
            "checkpoint": str(checkpoint.path),
        }
        self.summary |= {key: self.summary.get(key) for key in (*RESULTS, "images_per_second")}
        self.summary |= {} if self.score == "top1" else {"metric": self.score}
        self.summary |= {"packed_file": None, "packed_bytes": None}
        if self.config.stages[last].quant is not None:
            packed = convert_run(self.run_dir, self.run_dir / PACKED_FILE, last)
            self.summary |= {"packed_file": str(packed.path), "packed_bytes": packed.file_bytes}
        self.metrics.write("summary", last, self.totals[last], **self.summary)
        write_summary(self.run_dir, self.summary)
        write_report(self.run_dir)
        closing_table(self.summary, run_dir=self.run_dir)
