"""The commands of tools/analyze.py: measure, print a table, write JSON and pictures."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dsquant.analysis import allocation, plots, tables
from dsquant.analysis.allocation import CANDIDATES
from dsquant.analysis.bit_search import bits_of, search_bits
from dsquant.analysis.modules import find_modules, pool, select
from dsquant.analysis.oscillation import final_by_part, oscillation
from dsquant.analysis.outliers import outliers
from dsquant.analysis.sensitivity import leave_one_out
from dsquant.analysis.subject import Samples, Subject, open_model, open_run
from dsquant.analysis.variants import post_training, trained, uniform_policy
from dsquant.config import ModelConfig, RunConfig, load_config
from dsquant.errors import ConfigError
from dsquant.files import write_atomically
from dsquant.models import text_model
from dsquant.run_folder import RECIPE_FILE

DEFAULT_BITS = 4
IMAGENET_CLASSES = 1000
SHOWN = {"recovery_loss": "loss recovered", "harm_loss": "loss added", "harm_kl": "KL of predictions from float's"}
WIDTH = 120  # of tables that go to a file


class Analyze:
    """Find out where a model suffers from quantization.

    Commands: sensitivity, outliers, oscillation, allocate, all. `analyze.py COMMAND --help` lists the options of one;
    these are common to all of them:

    Args:
        run: the folder of a run; its newest checkpoint is taken, or that of --stage.
        stage: a stage of the run (for allocate: of the recipe that is written).
        model: a model instead of a run: of timm, for example deit_tiny_patch16_224, or with --library transformers a text
            model: of the hub, a folder, or package:NAME.
        library: of --model: timm or transformers.
        checkpoint: its float weights, a file; without one, the weights that timm or transformers downloads.
        num_classes: its classes; by default 1000, or what the configuration of a text model says.
        model_kwargs: further arguments of timm.create_model, for example '{"img_size": 32}', or of a text model's configuration.
        image_size: of its input, where that is not what its pretrained configuration says.
        max_length: tokens that sentences are cut to, of a text model by --model.
        tokenizer: folder of its tokenizer, where it does not lie with the model.
        data: WebDataset shards to measure on (folder or pattern); by default the run's validation shards.
        eval_batches: at most so many batches, a random subset that is the same for every variant; 0 takes every sample.
        calibration_batches: batches to fit activation scales to (of the run's training shards, or of --data).
        batch_size: samples at a time.
        seed: of the random subsets.
        num_workers: processes that decode images or tokenize sentences.
        device: cuda or cpu; a GPU where there is one by default.
        out: the folder that results go to.
        plots: write pictures as well (needs matplotlib).
    """

    def __init__(
        self, run: str | None = None, stage: str | None = None, model: str | None = None, library: str = "timm",
        checkpoint: str | None = None, num_classes: int | None = None, model_kwargs: dict[str, Any] | None = None,
        image_size: int | None = None, max_length: int = 128, tokenizer: str | None = None, data: str | None = None,
        eval_batches: int = 8, calibration_batches: int = 4, batch_size: int = 64, seed: int = 0, num_workers: int = 0,
        device: str | None = None, out: str = "analysis", plots: bool = True,
    ):  # fmt: skip
        self._run = None if run is None else Path(str(run))
        self._stage = None if stage is None else str(stage)
        self._model, self._library, self._classes = model, library, num_classes
        self._checkpoint = None if checkpoint is None else str(checkpoint)
        self._kwargs, self._image_size = model_kwargs or {}, image_size
        self._max_length, self._tokenizer = max_length, None if tokenizer is None else str(tokenizer)
        self._samples = Samples(
            None if data is None else str(data), eval_batches, calibration_batches, batch_size, seed, num_workers
        )
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        path = Path(str(out))
        self._file = path if path.suffix in (".yaml", ".yml") else None
        self._out, self._plots = path.parent if self._file else path, _flag("plots", plots)
        self._console = Console(width=None if sys.stdout.isatty() else WIDTH)
        self._subjects: dict[str | None, Subject] = {}

    def sensitivity(
        self, n_bits: int | None = None, modules: str | None = None, by: str = "module", what: str = "both",
        granularity: str = "per_tensor",
    ) -> None:  # fmt: skip
        """Measure each module left in float with all else quantized, and quantized with all else in float.

        Args:
            n_bits: bits of every site, quantized after training (4 by default). Without it a quantized stage of a run is
                measured with the quantizers that it has trained.
            modules: globs of module names, separated by commas, for example '*.attn.q,*.attn.k,*.attn.v'.
            by: module (each by itself), kind (every attn.v of the model together) or block.
            what: both, or weights or activations alone.
            granularity: of the weights: per_tensor (q, k and v apart) or per_channel.
        """
        self._check_output()
        subject = self._subject(self._stage)
        if n_bits is None and subject.quantized:
            variants = trained(subject)
        else:
            variants = post_training(subject, uniform_policy(n_bits or DEFAULT_BITS, granularity))
        chosen = pool(select(find_modules(variants.sites, what), modules), by)
        with tables.bar() as progress:
            result = leave_one_out(variants, subject, chosen, tables.tracker(progress, "sensitivity"))
        self._write("sensitivity", result)
        for name in ("float", "quantized"):
            self._console.print(f"{name}: loss {result[name]['loss']:.4f}, top-1 {result[name]['top1']:.2f} %")
        self._console.print(tables.sensitivity_table(result))
        if not self._plots:
            return
        self._shown(plots.sensitivity_bars(result, self._out / "sensitivity.png"))
        if by == "module":
            for key, says in SHOWN.items():
                values = {row["name"]: row[key] for row in result["modules"]}
                title = f"{subject.name}: {says}, by module"
                path = self._out / f"sensitivity_{key}.png"
                self._shown(plots.block_table(values, path, title=title, label=f"{says} (nats)"))

    def outliers(self) -> None:
        """Describe the outliers of every weight and activation: whole, per channel, per head."""
        self._check_output()
        result = outliers(self._subject(self._stage))
        self._write("outliers", result)
        self._console.print(tables.outlier_table(result))
        if self._plots:
            for statistic in ("max_over_std", "kurtosis"):
                self._shown(plots.outlier_boxes(result, self._out / f"outliers_channels_{statistic}.png", statistic))
            if heads_path := plots.outlier_heads(result, self._out / "outliers_heads.png"):
                self._shown(heads_path)

    def oscillation(self) -> None:
        """Show which modules' weights oscillated over a run, and which still did at its end."""
        self._oscillation(self._stage)

    def _oscillation(self, stage: str | None) -> None:
        self._check_output()
        if self._run is None:
            raise ConfigError("oscillation is recorded by a run: give --run")
        result = oscillation(self._run, stage)
        result["final_parts"] = final_by_part(self._run, result["stage"])
        self._write("oscillation", result)
        self._console.print(tables.oscillation_table(result))
        if result["final_parts"] is None:
            self._console.print(f"q, k and v are not told apart: stage {result['stage']} has no checkpoint")
        if self._plots:
            self._shown(plots.oscillation_curves(result, self._out / "oscillation.png"))

    def allocate(
        self, budget_bits: float | None = None, budget_bytes: int | None = None, bits: tuple[int, ...] = CANDIDATES,
        recipe: str | None = None, activation_budget_bits: float | None = None, from_stage: str | None = None,
        cost: str = "loss",
    ) -> None:  # fmt: skip
        """Find the bits of each weight that cost the least loss within a size, and write them for the next run.

        Into the folder --out go allocation.json, policy.yaml (rules for `stages.NAME.quant.rules`) and recipe.yaml (the
        whole recipe with the rules put in). `--out FILE.yaml` names one file instead: the recipe where --recipe is given,
        the rules otherwise. Measure on --data that the model is not judged on afterwards.

        Args:
            budget_bits: bits of a weight on average, first and last layer included (3 by default).
            budget_bytes: instead of it, bytes of all codes together.
            bits: the candidates, separated by commas.
            recipe: the recipe to put the rules into, by name or path; by default that of the run. Its stage is --stage, or
                its last one that quantizes.
            activation_budget_bits: allocate activations too, with so many bits on average over one sample's elements.
            from_stage: the float stage of the run whose weights are measured; by default its last.
            cost: loss, its increase; or kl, how far predictions move from float's: of few samples the less noisy one.
        """
        self._allocate(
            self._stage, recipe, from_stage, candidates=tuple(bits) if isinstance(bits, tuple | list) else (bits,),
            budget_bits=budget_bits, budget_bytes=budget_bytes, activation_budget_bits=activation_budget_bits, cost=cost,
        )  # fmt: skip

    def _allocate(self, stage: str | None, recipe: str | None, from_stage: str | None, **search: Any) -> None:
        self._check_output(one_file=True)
        config = load_config(str(recipe or self._recipe_of_run()))
        stage = stage or allocation.default_stage(config, search["candidates"])
        quant = allocation.allocatable(config, stage, search["candidates"])
        subject = self._subject((from_stage or self._float_stage()) if self._run else None)
        wanted, given = ((m.name, m.num_classes, m.kwargs, m.rotate) for m in (config.model, subject.config))
        if wanted != given:
            raise ConfigError(f"recipe {config.recipe} is for the model {wanted}; what is measured is {given}")
        with tables.bar() as progress:
            result = search_bits(subject, quant, progress=lambda label: tables.tracker(progress, label), **search)
        self._show_allocation(result)
        self._write_allocation(result, config, stage, with_recipe=recipe is not None)

    def _show_allocation(self, result: dict[str, Any]) -> None:
        for part in ("weights", "activations"):
            if found := result[part]:
                self._console.print(tables.allocation_table(result, part))
                self._console.print(
                    f"{part}: {found['average_bits']:.3f} bits on average (budget {found['budget_bits']:.3f}), "
                    f"{found['bytes']:,} bytes; predicted {result['cost']} {found['predicted_cost']:+.4f}"
                )
        for name in ("float", "allocated", "uniform"):
            if row := result[name]:
                bits = f" ({'/'.join(map(str, row['n_bits']))} bits)" if "n_bits" in row else ""
                self._console.print(f"{name}{bits}: loss {row['loss']:.4f}, top-1 {row['top1']:.2f} %, untrained")

    def _write_allocation(self, result: dict[str, Any], config: RunConfig, stage: str, *, with_recipe: bool) -> None:
        bits, found = bits_of(result), result["weights"]
        note = f"Bits by tools/analyze.py allocate, measured on {result['subject']}: {found['average_bits']:.3f} bits a weight"
        policy_note = note + "\nPut these rules at the end of `stages.NAME.quant.rules` of a recipe."
        folder, single = self._out, self._file
        if single is None or not with_recipe:
            self._shown(allocation.write_policy(single or folder / "policy.yaml", bits, policy_note))
        if single is None or with_recipe:
            path = allocation.write_recipe(single or folder / "recipe.yaml", config, stage, bits, note)
            load_config(str(path))
            self._shown(path)
            self._console.print(
                f"train it: deepspeed dsquant/train.py --ds_config ds_configs/zero2.json --recipe {path}"
            )
        stem = single.stem + "_allocation" if single else "allocation"
        self._write(stem, result)
        if self._plots:
            for part in ("weights", "activations"):
                if result[part]:
                    title = f"{result['subject']}: bits of {part}, {result[part]['average_bits']:.2f} on average"
                    path = folder / f"{stem}_{part}.png"
                    self._shown(plots.allocation_bits(result[part]["bits"], path, title=title))

    def all(self, n_bits: int | None = None, budget_bits: float | None = None) -> None:
        """Do everything that the subject allows: oscillation and allocation need a run with a quantized stage.

        Args:
            n_bits: as for sensitivity.
            budget_bits: as for allocate.
        """
        self.sensitivity(n_bits)
        self.outliers()
        config = load_config(str(self._recipe_of_run())) if self._run else None
        quantized = [name for name, stage in config.stages.items() if stage.quant is not None] if config else []
        if not quantized:
            self._console.print("oscillation and allocation left out: they need --run of a recipe that quantizes")
            return
        self._oscillation(self._stage if self._stage in quantized else None)
        able = [name for name in quantized if allocation.can_have(config.stages[name].quant, CANDIDATES)]
        if not able:
            self._console.print("allocation left out: the weights of no stage have a choice of bits")
            return
        stage = self._stage if self._stage in able else able[-1]
        self._allocate(stage, None, None, candidates=CANDIDATES, budget_bits=budget_bits)

    def _subject(self, stage: str | None) -> Subject:
        """Open what is analysed, once for each stage."""
        if (self._run is None) == (self._model is None):
            raise ConfigError("give either --run RUN or --model NAME")
        if stage not in self._subjects:
            self._subjects[stage] = self._opened(stage)
        return self._subjects[stage]

    def _opened(self, stage: str | None) -> Subject:
        if self._run is not None:
            return open_run(self._run, stage, self._samples, self._device)
        if stage is not None:
            raise ConfigError("--stage is a stage of a run; a model by name has none")
        if self._library not in ("timm", "transformers"):
            raise ConfigError(f"--library is {self._library!r}; it is timm or transformers")
        if self._library == "transformers":
            config = text_model(
                self._model, num_classes=self._classes, checkpoint=self._checkpoint, max_length=self._max_length,
                kwargs=self._kwargs,
            )  # fmt: skip
        else:
            config = ModelConfig(
                name=self._model, num_classes=self._classes or IMAGENET_CLASSES, pretrained=self._checkpoint is None,
                checkpoint=self._checkpoint, kwargs=self._kwargs,
            )  # fmt: skip
        return open_model(config, self._samples, self._device, image_size=self._image_size, tokenizer=self._tokenizer)

    def _recipe_of_run(self) -> Path:
        if self._run is None:
            raise ConfigError("give --recipe: whose bits are to be chosen (a run has its own)")
        if not (self._run / RECIPE_FILE).is_file():
            raise ConfigError(f"{self._run} holds no {RECIPE_FILE}; give the --out_dir of a run")
        return self._run / RECIPE_FILE

    def _float_stage(self) -> str:
        stages = load_config(str(self._recipe_of_run())).stages
        floats = [name for name, stage in stages.items() if stage.quant is None]
        if not floats:
            raise ConfigError(f"{self._run} has no float stage; name the stage to measure with --from_stage")
        return floats[-1]

    def _check_output(self, *, one_file: bool = False) -> None:
        """Raise ConfigError for what would fail only after all is measured."""
        if self._file and not one_file:
            raise ConfigError(f"--out {self._file} is a file; give the folder that results go to")
        if self._plots:
            plots.require_matplotlib()

    def _write(self, name: str, result: dict[str, Any]) -> None:
        path = self._out / f"{name}.json"
        write_atomically(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
        self._shown(path)

    def _shown(self, path: Path) -> None:
        self._console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _flag(name: str, value: bool | str) -> bool:
    """Read a flag as recipes do: fire takes `--plots=false` for a word."""
    if isinstance(value, bool):
        return value
    if str(value).lower() not in ("true", "false"):
        raise ConfigError(f"--{name} is {value!r}; it takes true or false")
    return str(value).lower() == "true"
