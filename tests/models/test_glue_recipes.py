"""The GLUE recipes of BERT: their sites at full size, and training steps of every stage at reduced size."""

import pytest
import torch

from dsquant.config import RECIPES, load_config
from dsquant.losses import hidden_loss, stage_loss
from dsquant.models import build_model, insert_sites

NAMES = sorted(path.stem for path in RECIPES.glob("glue_*.yaml"))
STAGES = {"w1a4": 4, "w1a2": 2, "w1a1": 1}
TINY = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 130, "attention_probs_dropout_prob": 0.0}  # fmt: skip
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


def recipe(name, kwargs):
    changes = {"model.name": "bert", "model.pretrained": False, "model.kwargs": kwargs}
    return load_config(name, changes)


def test_every_task_of_glue_that_the_papers_report_has_a_recipe():
    tasks = {"mnli", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte"}
    assert {name.rsplit("_", 1)[1] for name in NAMES if "base" in name} == tasks


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_1_bit_and_the_head_8_and_w1a1_is_taught_by_w1a2(name):
    config = recipe(name, BERT_BASE | {"attention_probs_dropout_prob": 0.0})
    assert list(config.stages) == ["fp", *STAGES]
    assert config.targets.keys() == STAGES.keys()
    for stage, n_bits in STAGES.items():
        with torch.device("meta"):
            sites = insert_sites(build_model(config.model), config.stages[stage].quant.policy())
        assert {s.name for s in sites.weights if s.spec.n_bits == 8} == {"classifier.weight"}
        assert {s.spec.n_bits for s in sites.weights} == {1, 8}
        assert {s.spec.n_bits for s in sites.activations} == {n_bits, 8}
        assert len(sites.weights) == 1 + 12 * 6 + 2
    assert config.stages["w1a1"].init_from == config.stages["w1a1"].distill.teacher == "w1a2"


def step_every_stage(names):
    """Take two steps of each stage of each recipe, taught by a float model; return losses by recipe and stage."""
    from dsquant.config import load_ds_config
    from dsquant.engine import Engine, init_world
    from dsquant.models import model_outputs
    from dsquant.quant.calibrate import calibrate

    world, found = init_world(), {}
    world.use_precision("fp32")
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": torch.randint(3, 60, (8, 10), generator=generator),
        "attention_mask": torch.ones(8, 10).long(),
    }
    for name in names:
        config = recipe(name, TINY)
        labels = torch.rand(8) if config.model.num_classes == 1 else torch.arange(8) % config.model.num_classes
        torch.manual_seed(0)
        teacher = build_model(config.model).eval()
        for stage_name in STAGES:
            stage = config.stages[stage_name].model_copy(update={"batch_size": 8, "epochs": None, "steps": 2})
            torch.manual_seed(0)
            engine = Engine(build_model(config.model), config, stage, load_ds_config("ds_configs/zero1.json"), world, 2)
            engine.eval()
            bind = lambda engine=engine: engine.sites.bind(engine.state)  # noqa: E731
            calibrate(engine.sites.quantizers, engine.state, engine.evaluate_logits, [inputs], 1, bind)
            engine.train()
            engine.finish_calibration()
            losses = []
            for _ in range(2):
                with torch.no_grad():
                    teacher_logits, taught = model_outputs(teacher, inputs, hidden=True)
                logits, hidden = engine.outputs(inputs, hidden=True)
                loss = stage_loss(logits, labels, teacher_logits, stage.distill, 0.0)
                loss = loss + stage.distill.hidden * hidden_loss(hidden, taught, inputs["attention_mask"])
                engine.backward(loss)
                engine.step(stage.lr)
                losses.append(loss.item())
            found[name, stage_name] = losses
            engine.destroy()
    return found


@pytest.mark.slow
def test_at_reduced_size_every_stage_of_every_recipe_steps(run_ranks):
    (found,) = run_ranks(1, "tests.models.test_glue_recipes:step_every_stage", names=NAMES, timeout=300)
    assert found.keys() == {(name, stage) for name in NAMES for stage in STAGES}
    assert all(torch.isfinite(torch.tensor(losses)).all() and losses[0] != losses[1] for losses in found.values())
