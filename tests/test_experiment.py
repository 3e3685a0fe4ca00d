"""Experiment: consistency checks, overrides by path, names, and JSON serialization."""

import dataclasses
import importlib
import json

import experiment_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import checkpoint, data, evals, model, objectives, optim, training
from lm.declaration import text
from lm.errors import UserError
from lm.experiment import (
    LONGEST_NAME,
    MAY_CHANGE,
    NAME,
    Experiment,
    describe,
    differences,
    from_json,
    identity,
    override,
    paths,
    to_json,
)
from lm.parallel.mesh import Mesh, Place
from lm.precision import BF16
from lm.recipe import stages_of

BASE = Experiment(
    name="small",
    model=model.Config(
        vocab=512,
        dim=16,
        layers=2,
        attention=model.GQA(heads=4, kv_heads=2, head_dim=8, position=model.RoPE(theta=10_000)),
        ffn=model.SwiGLU(hidden=24),
    ),
    data=data.Text(path="*.txt"),
    tokenizer=data.SentencePiece(vocab=512),
    batch=data.BatchShape(sequences=8, length=32),
    optimizer=optim.AdamW(b2=0.95, clip_norm=1.0),
    schedule=optim.WSD(peak=1e-3, warmup=0.1, decay=0.3, steps=100),
    evals=(evals.Perplexity(every=50),),
)
MIXED = dataclasses.replace(
    BASE,
    data=data.Mixture(
        sources={"web": data.Text(path="a"), "code": data.Jsonl(path="b", field="body")},
        weights=((0, {"web": 0.9, "code": 0.1}), (50, {"web": 0.5, "code": 0.5})),
    ),
    model=dataclasses.replace(BASE.model, ffn=model.MoE(experts=4, experts_per_token=2, hidden=8)),
    optimizer=optim.Muon(),
    schedule=optim.WarmupCosine(peak=1e-3, warmup=optim.Tokens(1e3), steps=optim.Tokens(1e5)),
    precision=BF16,
    evals=(evals.Perplexity(source="web"), evals.Perplexity(source="code", batches=2)),
    log=training.Log(trace=(3, 5)),
    sample=("a", "b"),
)


def changed(*written, base=BASE):
    return override(base, written)


# ---- Consistency between configs


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": "a/b"}, "name='a/b' must be a folder's name"),
        ({"name": ""}, "name='' must be"),
        ({"name": ".."}, "name='..' must be"),
        ({"name": "x" * 151}, "at most 150"),
        ({"places": {}}, "places={} must name one place"),
        ({"tokenizer": data.SentencePiece(vocab=600)}, "tokenizer.vocab=600 is more than model.vo"),
        ({"evals": (evals.Perplexity(source="web"),)}, "evals.0.source='web' is not a source"),
        ({"evals": evals.Perplexity()}, "must be a list of .*Perplexity"),
        ({"seed": "0"}, "seed='0' must be a whole number"),
        ({"places": {"single": Mesh()}}, "places.single=Mesh\\(\\) must be Place"),
        ({"optimizer": optim.WSD}, "optimizer=.* must be .*AdamW"),
        (
            {"schedule": optim.WSD(peak=1, warmup=90, decay=optim.Tokens(1e4), steps=100)},
            "comes to .* steps, more than schedule.steps=100",
        ),
    ],
)
def test_inconsistent_experiment_raises_user_error_on_construction(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(BASE, **fields)


@pytest.mark.parametrize(
    ("mesh", "microbatches", "sentence"),
    [
        ("data=3", 1, "batch.sequences=8 must be a multiple of 3: .* mesh data=3"),
        ("data=2", 8, "batch.sequences=8 must be a multiple of 16: microbatches=8 times the 2"),
        ("data=1", 3, "batch.sequences=8 must be a multiple of 3: microbatches=3"),
        ("tensor=3", 1, "mesh tensor=3: .* choose a multiple of 3"),
        ("fsdp=32", 1, "batch.sequences=8 must be a multiple of 32"),
        ("tensor=8", 1, "heads of size 4 does not divide over mesh tensor=8"),
    ],
)
def test_place_with_indivisible_sizes_raises_user_error(mesh, microbatches, sentence):
    place = Place(mesh=Mesh.parse(mesh), microbatches=microbatches)
    with pytest.raises(UserError, match=sentence):
        BASE.check_place(place)


@pytest.mark.parametrize("mesh", ["data=1", "data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_place_with_divisible_sizes_is_accepted(mesh):
    BASE.check_place(Place(mesh=Mesh.parse(mesh)))
    MIXED.check_place(Place(mesh=Mesh.parse(mesh)))


def test_experts_must_be_divisible_over_expert_axis():
    MIXED.check_place(Place(mesh=Mesh(expert=4)))
    with pytest.raises(UserError, match="expert of size 4 does not divide over mesh expert=8"):
        MIXED.check_place(Place(mesh=Mesh(expert=8)))


def test_every_batch_size_of_a_ramp_must_be_divisible():
    batch = data.BatchShape(sequences=8, length=32, ramp=((10, 2), (20, 4)))
    ramped = dataclasses.replace(BASE, batch=batch)
    ramped.check_place(Place(mesh=Mesh(data=2)))
    with pytest.raises(UserError, match="batch.ramp.0.1=2 must be a multiple of 4"):
        ramped.check_place(Place(mesh=Mesh(data=4)))


# ---- Overrides by path

CHANGES = {
    "schedule.steps=50": lambda e: e.schedule.steps == 50,
    "schedule.steps=Tokens(1e4)": lambda e: e.schedule.steps == optim.Tokens(1e4),
    "schedule.warmup=0.2": lambda e: e.schedule.warmup == 0.2,
    "schedule.warmup=5": lambda e: type(e.schedule.warmup) is int,
    "model.layers=1": lambda e: e.model.layers == 1,
    "model.layers=1e1": lambda e: e.model.layers == 10,
    "model.vocab=2_000": lambda e: e.model.vocab == 2000,
    "model.attention.window=16": lambda e: e.model.attention.window == 16,
    "model.attention.position=NoPosition()": lambda e: (
        e.model.attention.position == model.NoPosition()
    ),
    "model.ffn=SwiGLU(hidden=128)": lambda e: e.model.ffn.hidden == 128,
    "model.ffn=model.GeGLU(hidden=12)": lambda e: e.model.ffn == model.GeGLU(hidden=12),
    "model.norm=LayerNormConfig()": lambda e: e.model.norm == model.LayerNormConfig(),
    "model.tied=true": lambda e: e.model.tied is True,
    "model.logit_softcap=30": lambda e: e.model.logit_softcap == 30.0,
    "data.path=books/*.txt": lambda e: e.data.path == "books/*.txt",
    "data.path=('a.txt','b.txt')": lambda e: e.data.path == ("a.txt", "b.txt"),
    "data=StandardLibrary(held_out=0.1)": lambda e: e.data == data.StandardLibrary(held_out=0.1),
    'data=Tfds(name="tiny_shakespeare")': lambda e: e.data == data.Tfds("tiny_shakespeare"),
    "data=Text('a.txt')": lambda e: e.data == data.Text("a.txt"),
    "optimizer.b2=0.99": lambda e: e.optimizer.b2 == 0.99,
    "optimizer.clip_norm=none": lambda e: e.optimizer.clip_norm is None,
    "optimizer=Lion(b1=0.5)": lambda e: e.optimizer == optim.Lion(b1=0.5),
    "places.single.microbatches=2": lambda e: e.places["single"].microbatches == 2,
    "places.single.mesh.data=2": lambda e: e.places["single"].mesh == Mesh(data=2),
    "evals.0.every=5": lambda e: e.evals == (evals.Perplexity(every=5),),
    "evals=()": lambda e: e.evals == (),
    "save.every=7": lambda e: e.save.every == 7,
    "save.minutes=2": lambda e: e.save.minutes == 2.0,
    "save=Save(every=3)": lambda e: e.save == checkpoint.Save(every=3),
    "log.trace=(3, 5)": lambda e: e.log.trace == (3, 5),
    "precision.compute=bfloat16": lambda e: e.precision == BF16,
    "sample=def read(": lambda e: e.sample == "def read(",
    "objective.z_loss=1e-4": lambda e: e.objective == objectives.NextToken(z_loss=1e-4),
    "seed=3": lambda e: e.seed == 3,
}


@pytest.mark.parametrize("written", CHANGES)
def test_override_is_applied_and_added_to_the_name(written):
    """Settings that may change when a run is resumed are not part of its name."""
    got = changed(written)
    assert CHANGES[written](got)
    path = written.split("=")[0]
    if path.split(".")[0] in MAY_CHANGE:
        assert got.name == "small"
    else:
        assert got.name.startswith("small+")
    assert NAME.fullmatch(got.name)
    assert all(line.startswith((path, "name: ")) for line in differences(BASE, got))


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("model.layer=2", "model.layer is not known. Did you mean 'model.layers'"),
        ("layers=2", "Did you mean 'model.layers'"),
        ("modle.layers=2", "Did you mean 'model.layers'"),
        ("scheduel.steps=5", "Did you mean 'schedule.steps'"),
        ("places.singel.microbatches=2", "Did you mean 'places.single.microbatches'"),
        ("model.layers=two", "model.layers=two must be a whole number"),
        ("model.layers=2.5", "model.layers=2.5 must be a whole number"),
        ("model.layers", "--set model.layers needs a value, as in model.layers=VALUE"),
        ("optimizer.b2=x", "optimizer.b2=x must be a number"),
        ("optimizer=AdamWW()", r"optimizer=AdamWW\(...\) is not known there. Did you mean 'AdamW'"),
        ("model.ffn=SwiGLU(hiden=2)", "model.ffn.hiden is not known. Did you mean 'hidden'"),
        ("model.attention.kv_heads=3", "kv_heads=3"),  # raised by the config itself
        ("precision.loss_scale.initial=2", "Choose it whole, as in precision.loss_scale=LossScale"),
        ("tokenizer.vocab=9999", "tokenizer.vocab=9999 is more than model.vocab=512"),
        ("schedule.steps=0", "schedule.steps"),
    ],
)
def test_invalid_override_raises_user_error(written, sentence):
    with pytest.raises(UserError, match=sentence):
        changed(written)


def test_overrides_that_depend_on_each_other_are_applied_together():
    got = changed("tokenizer.vocab=600", "model.vocab=600")
    assert (got.tokenizer.vocab, got.model.vocab) == (600, 600)
    got = changed("model.attention.heads=3", "model.attention.kv_heads=3")
    assert (got.model.attention.heads, got.model.attention.kv_heads) == (3, 3)


def test_name_lists_overrides_independent_of_their_order():
    assert changed().name == "small"
    assert changed("model.layers=2", "optimizer.b2=0.950").name == "small"
    name = changed("schedule.steps=50", "model.layers=1").name
    assert name == "small+model.layers=1+schedule.steps=50"
    assert changed("model.layers=1", "schedule.steps=50").name == name
    assert changed("model.layers=1", "schedule.steps=5e1").name == name
    assert changed("name=mine", "model.layers=1").name == "mine"
    with pytest.raises(UserError, match="--set model.layers is given twice: 1 and 3"):
        changed("model.layers=1", "model.layers=3")


def test_names_are_distinct_valid_folder_names():
    written = ["data.path=a/*.txt", "data.path=a-*.txt", "data.path=a?.txt", "start=a b"]
    written += ["data.path=" + "y" * 300, "data.path=" + "y" * 301, "start=a  b"]
    written += ["model.ffn=SwiGLU(hidden=128)", "optimizer=Lion(b1=0.5)", "optimizer=Lion(b1=0.6)"]
    names = [changed(each).name for each in written]
    assert len(set(names)) == len(names)
    assert all(NAME.fullmatch(name) and len(name) <= LONGEST_NAME for name in names)
    many = {each.split("=")[0]: each for each in CHANGES if each.count(".") == 1}
    name = changed(*many.values()).name
    assert len(name) == LONGEST_NAME
    assert changed(*reversed(many.values())).name == name


def test_setting_every_path_to_its_current_value_changes_nothing():
    for experiment in (BASE, MIXED):
        known = {each.path: each for each in paths(experiment)}
        assert {"schedule.steps", "save.every", "data", "model.ffn"} <= set(known)
        assert known["model.layers"][1:] == (2, "a whole number")
        given = [f"{path}={text(each.value)}" for path, each in known.items() if path != "name"]
        assert override(experiment, given) == experiment


# ---- JSON, differences, text


def through_json(experiment):
    return from_json(json.loads(json.dumps(to_json(experiment), allow_nan=False)))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(sorted(CHANGES)), unique_by=lambda written: written.split("=")[0]))
def test_json_round_trip_preserves_overridden_experiment(written):
    try:
        experiment = changed(*written)
    except UserError:  # some overrides exclude each other
        return
    assert through_json(experiment) == experiment
    assert repr(through_json(experiment)) == repr(experiment)


def test_json_round_trip_preserves_every_kind_of_config():
    assert through_json(MIXED) == MIXED
    assert to_json(BASE)["model"]["attention"]["type"] == "lm.model.GQA"
    assert to_json(BASE)["type"] == "lm.experiment.Experiment"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"colour": 1}, "colour is not a field of Experiment in this version of lm"),
        ({"batch": {"type": "lm.data.Bundle"}}, "batch has the type 'lm.data.Bundle'"),
        ({"batch": {"type": "os.system"}}, "batch has the type 'os.system'"),
        ({"seed": "x"}, "seed='x' must be a whole number"),
        ({"type": "lm.parallel.mesh.Mesh"}, "is not a field of Mesh"),
    ],
)
def test_from_json_rejects_unknown_types_and_fields(change, sentence):
    with pytest.raises(UserError, match=sentence):
        from_json({**to_json(BASE), **change})
    with pytest.raises(UserError, match="not an experiment but Mesh"):
        from_json({"type": "lm.parallel.mesh.Mesh"})


def test_identity_excludes_settings_that_may_change():
    same = changed(
        "name=small",
        "save.every=7",
        "log.every=3",
        "evals=()",
        "places.single.mesh.data=2",
        "sample=x",
    )
    assert same != BASE
    assert identity(same) == identity(BASE)
    for written in ("seed=1", "schedule.steps=50", "model.tied=true", "data.path=b"):
        assert identity(changed("name=small", written)) != identity(BASE)


def test_differences_list_path_and_both_values():
    other = changed("name=small", "schedule.steps=50", "model.ffn=GeGLU(hidden=24)", "evals=()")
    assert differences(BASE, other) == [
        "model.ffn: SwiGLU(hidden=24) -> GeGLU(hidden=24)",
        "schedule.steps: 100 -> 50",
        "evals: (Perplexity(every=50),) -> ()",
    ]
    assert differences(BASE, through_json(BASE)) == []


def test_describe_lists_every_value():
    lines = describe(BASE).splitlines()
    assert lines[:7] == [
        "name: 'small'",
        "seed: 0",
        "start: none",
        "model: Config",
        "  vocab: 512",
        "  dim: 16",
        "  layers: 2",
    ]
    assert "    theta: 10000" in "\n".join(lines)
    assert describe(BASE) == describe(through_json(BASE))
    leaves = [s for s in paths(BASE) if isinstance(s.value, int | float | str)]
    assert all(
        any(line.strip().startswith(s.path.split(".")[-1]) for line in lines) for s in leaves
    )


@pytest.mark.parametrize("name", experiment_files.NAMES)
def test_experiment_in_repository_round_trips_and_accepts_its_places(name):
    for declared in stages_of(importlib.import_module(f"experiments.{name}").experiment()):
        assert through_json(declared) == declared
        for place in declared.places.values():
            declared.check_place(place)
