"""Prepared TFDS datasets are read without TensorFlow, as ArrayRecord and as TFRecord."""

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
    """Texts with labels."""

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


def test_a_dataset_is_found_by_name_and_by_folder(folder):
    by_name = read(name="made_up_corpus", data_dir=str(folder))
    assert sorted(by_name) == sorted(TRAIN)  # TFDS shuffles during preparation
    assert read(name=str(folder / "made_up_corpus" / "1.0.0")) == by_name


def test_splits_and_slices(folder):
    dataset = {"name": "made_up_corpus", "data_dir": str(folder)}
    train = read(split="train", **dataset)
    assert read(split="train[:10]", **dataset) == train[:10]
    assert read(split="train[50%:]", **dataset) == train[15:]
    assert sorted(read(split="test", **dataset)) == sorted(TEST)
    assert sorted(read(split="train+test", **dataset)) == sorted(TRAIN + TEST)


def as_tfrecord(folder, target):
    """Writes the dataset as TFRecord, the format of published datasets. TFDS itself would need
    TensorFlow for this."""
    source = data.Tfds("made_up_corpus", data_dir=str(folder))
    version = target / "made_up_corpus" / "1.0.0"
    version.mkdir(parents=True)
    origin = folder / "made_up_corpus" / "1.0.0"
    (version / "features.json").write_text((origin / "features.json").read_text())
    info = (origin / "dataset_info.json").read_text()
    (version / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    builder = source._builder()
    for split in ("train", "test"):
        records = data.Tfds("made_up_corpus", data_dir=str(folder), split=split)._records(builder)
        with open(version / f"made_up_corpus-{split}.tfrecord-00000-of-00001", "wb") as file:
            for record in records:
                # Length and its checksum, record and its checksum.
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
    return target


def test_tfrecord_yields_the_same_documents_as_array_record(folder, tmp_path):
    tfrecord = {"name": "made_up_corpus", "data_dir": str(as_tfrecord(folder, tmp_path))}
    array_record = {"name": "made_up_corpus", "data_dir": str(folder)}
    for split in ("train", "train[3:10]", "test", "train+test"):
        assert read(split=split, **tfrecord) == read(split=split, **array_record)
    (file,) = tmp_path.rglob("*train.tfrecord*")
    file.write_bytes(file.read_bytes()[:-5_000])
    with pytest.raises(UserError, match="is damaged: it ends after"):
        read(**tfrecord)


def test_records_at_a_url(folder, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for place, read in (
        (folder, records.array_records),
        (as_tfrecord(folder, tmp_path), records.tfrecords),
    ):
        (file,) = place.rglob("made_up_corpus-train*")
        memory.pipe_file("/tfds/file", file.read_bytes())
        remote = list(read("memory://tfds/file", 3, 10))
        source = data.Tfds("made_up_corpus", split="train[3:10]", data_dir=str(folder))
        assert remote == list(source._records(source._builder()))


def test_tensorflow_is_not_imported(folder):
    script = (
        "import sys; from lm import data; "
        f"texts = list(data.Tfds('made_up_corpus', data_dir={str(folder)!r}).documents()); "
        "print(len(texts), 'tensorflow' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout.split() == [str(len(TRAIN)), "False"], ended.stderr


def test_the_recipe_identifies_the_dataset(folder):
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
def test_invalid_fields_are_errors(fields, words, folder):
    with pytest.raises(UserError, match=words):
        read(**{"name": "made_up_corpus", "data_dir": str(folder), **fields})
