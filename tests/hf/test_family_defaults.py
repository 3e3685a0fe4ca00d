"""A field that config.json leaves out has the value that transformers gives it."""

import json
from pathlib import Path

import pytest

from lm.errors import UserError
from lm.hf import families
from lm.hf.config_json import Fields

HERE = Path(__file__).parent
DEFAULTS = json.loads((HERE / "family_defaults.json").read_text())  # see family_defaults.py
ALIASES = {
    "rope_theta": ["rope_parameters"],
    "num_experts": ["num_local_experts"],
    "num_local_experts": ["num_experts"],
}


def base(family):
    return json.loads((HERE / "folders" / family / "config.json").read_text())


@pytest.mark.parametrize("version", DEFAULTS)
@pytest.mark.parametrize("family", DEFAULTS["5.24.0"])
def test_a_missing_field_has_the_default_of_transformers_or_is_refused(family, version):
    config = base(family)
    named, _ = families.read(config)
    fields = Fields(config)
    named.config(fields)  # notes what it reads
    compared = set()
    for field, default in DEFAULTS[version][family].items():
        if default is None or field not in fields.read:
            continue
        absent = {field, *ALIASES.get(field, ())}
        without = {name: value for name, value in config.items() if name not in absent}
        try:
            _, implicit = families.read(without)
        except UserError:
            continue
        assert implicit == families.read(without | {field: default})[1], field
        compared.add(field)
    assert compared >= {"rms_norm_eps", "tie_word_embeddings"}
