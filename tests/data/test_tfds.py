"""TFDS datasets are read without TensorFlow: prepared ones in a folder, in both of its formats."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from made_up_corpus import documents

from lm import data
from lm.data import records
from lm.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

TRAIN, TEST = documents(30, seed=3), documents(5, seed=4)


class MadeUpCorpus(tfds.core.GeneratorBasedBuilder):
    """Texts with a label beside them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples(TRAIN), "test": self._generate_examples(TEST)}

    def _generate_examples(self, texts):
        yield from enumerate({"text": text, "label": i} for i, text in enumerate(texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tfds")
    builder = MadeUpCorpus(data_dir=place, file_format="array_record")
    builder.download_and_prepare()
    return place


def read(**fields):
    return list(data.Tfds(**fields).documents())


def test_all_documents_by_name_and_by_folder(folder):
    by_name = read(name="made_up_corpus", data_dir=str(folder))
    assert sorted(by_name) == sorted(TRAIN)  # TFDS shuffles once, when it prepares
    assert read(name=str(folder / "made_up_corpus" / "1.0.0")) == by_name


def test_splits_and_slices(folder):
    place = {"name": "made_up_corpus", "data_dir": str(folder)}
    whole = read(split="train", **place)
    assert read(split="train[:10]", **place) == whole[:10]
    assert read(split="train[50%:]", **place) == whole[15:]
    assert sorted(read(split="test", **place)) == sorted(TEST)
    assert sorted(read(split="train+test", **place)) == sorted(TRAIN + TEST)


def as_tfrecord(folder, place):
    """The same dataset as TFRecord, the format of published ones; TFDS writes it by TensorFlow."""
    source = data.Tfds("made_up_corpus", data_dir=str(folder))
    target = place / "made_up_corpus" / "1.0.0"
    target.mkdir(parents=True)
    origin = folder / "made_up_corpus" / "1.0.0"
    (target / "features.json").write_text((origin / "features.json").read_text())
    info = (origin / "dataset_info.json").read_text()
    (target / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    builder = source._builder()
    for split in ("train", "test"):
        records = data.Tfds("made_up_corpus", data_dir=str(folder), split=split)._records(builder)
        with open(target / f"made_up_corpus-{split}.tfrecord-00000-of-00001", "wb") as file:
            for record in records:
                # A length and its checksum, the record and its checksum.
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
    return place


def test_tfrecord(folder, tmp_path):
    place = as_tfrecord(folder, tmp_path)
    here = {"name": "made_up_corpus", "data_dir": str(place)}
    there = {"name": "made_up_corpus", "data_dir": str(folder)}
    for split in ("train", "train[3:10]", "test", "train+test"):
        assert read(split=split, **here) == read(split=split, **there)
    (file,) = place.rglob("*train.tfrecord*")
    file.write_bytes(file.read_bytes()[:-5_000])
    with pytest.raises(UserError, match="is damaged after|ends after"):
        read(**here)


def test_records_at_a_url(folder, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for place, read in (
        (folder, records.array_records),
        (as_tfrecord(folder, tmp_path), records.tfrecords),
    ):
        (file,) = place.rglob("made_up_corpus-train*")
        memory.pipe_file("/tfds/file", file.read_bytes())
        found = list(read("memory://tfds/file", 3, 10))
        source = data.Tfds("made_up_corpus", split="train[3:10]", data_dir=str(folder))
        assert found == list(source._records(source._builder()))


def test_tensorflow_is_not_imported(folder):
    script = (
        "import sys; from lm import data; "
        f"texts = list(data.Tfds('made_up_corpus', data_dir={str(folder)!r}).documents()); "
        "print(len(texts), 'tensorflow' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout.split() == [str(len(TRAIN)), "False"], ended.stderr


def test_recipe_is_that_of_the_dataset(folder):
    recipe = data.Tfds("made_up_corpus", data_dir=str(folder)).recipe()
    assert "made_up_corpus/1.0.0" in recipe["fingerprint"] and str(folder) not in json.dumps(recipe)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"name": "made_up_korpus"}, "data.name='made_up_korpus'"),
        ({"split": "trai"}, "data.split='trai' is not a split of made_up_corpus: train, test"),
        ({"split": "train[:x]"}, "is not a split"),
        ({"field": "txt"}, "has no field 'txt' .data.field.. Did you mean 'text'"),
        ({"field": "label"}, "field 'label' holds"),
        ({"name": "tiny_shakespeare"}, "is not prepared in"),
    ],
)
def test_refusals(fields, words, folder):
    with pytest.raises(UserError, match=words):
        read(**{"name": "made_up_corpus", "data_dir": str(folder), **fields})
