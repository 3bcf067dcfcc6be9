"""Several labels per image: tables, few-shot splits, losses, mAP, a whole run, prediction, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pipelines import summary, the_run
from sklearn.metrics import average_precision_score

import pipeline
from pipeline.config import DataConfig
from pipeline.data.contents import dataset_fingerprint
from pipeline.data.index import index_dataset
from pipeline.data.multi_label_splits import sample_multi_label_splits
from pipeline.data.splits import ScannedImage, sample_splits
from pipeline.errors import UserError
from pipeline.grouping.features import feature_affinity
from pipeline.methods.adapter_file import load_adapter
from pipeline.report.scores import MultiLabelScores, jackknife_standard_error, paired_difference
from pipeline.training.multi_label import image_losses, label_tensor, prior_bias, summed_loss

DIGITS = ("zero", "one", "two", "three")


# --- Tables --------------------------------------------------------------------------------------------------

IMAGES = {"a.png": ["cat", "dog"], "b.png": ["dog"], "c.png": ["bird", "cat", "dog"], "d.png": ["bird"]}


def labels_of(file, **options):
    (file.parent / "images").mkdir(exist_ok=True)
    return {
        image.path: image.class_folders for image in index_dataset(DataConfig(multi_label=True, **options), file).images
    }


def write_table(folder, kind):
    """Write IMAGES as a table of this form, and return its file."""
    file = folder / f"table.{kind.split()[0]}"
    match kind:
        case "csv separator":
            lines = [f"{path},pets,{'; '.join(names)}" for path, names in IMAGES.items()]
            file.write_text("\n".join(["path,task,label", *lines]))
        case "csv rows":
            lines = [f"{path},pets,{name}" for path, names in IMAGES.items() for name in names]
            file.write_text("\n".join(["path,task,label", *lines[::-1]]))
        case "jsonl":
            rows = [{"path": path, "task": "pets", "label": names[::-1]} for path, names in IMAGES.items()]
            file.write_text("\n".join(map(json.dumps, rows)))
        case "parquet":
            columns = {"path": list(IMAGES), "task": ["pets"] * len(IMAGES), "label": list(IMAGES.values())}
            pq.write_table(pa.table(columns), file)
        case "parquet class labels":
            names = ["bird", "cat", "dog"]
            numbers = [[names.index(name) for name in labels] for labels in IMAGES.values()]
            table = pa.table({"path": list(IMAGES), "task": ["pets"] * len(IMAGES), "label": numbers})
            feature = {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "List"}
            metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
            pq.write_table(table.replace_schema_metadata(metadata), file)
    return file


FORMS = ("csv separator", "csv rows", "jsonl", "parquet", "parquet class labels")


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_a_table_name_the_same_labels(tmp_path, form):
    options = {"max_broken_fraction": 1.0}  # the images are not there
    assert labels_of(write_table(tmp_path, form), **options) == {path: tuple(names) for path, names in IMAGES.items()}


@pytest.mark.parametrize("form", FORMS)
def test_several_labels_without_the_field_are_an_error_that_names_it(tmp_path, form):
    with pytest.raises(UserError, match="--data.multi_label true"):
        index_dataset(DataConfig(max_broken_fraction=1.0), write_table(tmp_path, form))


def test_a_label_with_a_separator_that_may_be_one_class_is_noted(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text('path,task,label\na.png,pets,"cat;dog"\nb.png,pets,bird')
    index = index_dataset(DataConfig(max_broken_fraction=1.0), file)
    assert index.classes == {"pets": ("bird", "cat;dog")}
    assert "--data.multi_label true" in " ".join(index.notes)


def test_rows_of_an_image_with_other_tasks_contradict(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("path,task,label\na.png,pets,cat\na.png,wild,fox")
    with pytest.raises(UserError, match=r"line 3: a.png is also in line 2, as pets/cat"):
        index_dataset(DataConfig(multi_label=True), file)


def test_labels_that_class_names_leaves_out_do_not_count(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    file = write_table(tmp_path, "jsonl")
    indexed = labels_of(file, max_broken_fraction=1.0, class_names=str(names))
    assert indexed == {"a.png": ("cat", "dog"), "b.png": ("dog",), "c.png": ("cat", "dog")}


def test_folders_have_one_label_per_image(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pets" / name / "1.png")
    with pytest.raises(UserError, match=r"needs a table.*layout folders"):
        index_dataset(DataConfig(multi_label=True), tmp_path)


def test_the_field_alone_makes_another_data_set(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("path,task,label\na.png,pets,cat\nb.png,pets,dog")
    indices = [index_dataset(DataConfig(multi_label=value, max_broken_fraction=1.0), file) for value in (False, True)]
    assert dataset_fingerprint(indices[0]) != dataset_fingerprint(indices[1])
    assert indices[0].listing_fingerprint() != indices[1].listing_fingerprint()


# --- Splits --------------------------------------------------------------------------------------------------


def scanned(name, *labels, content=None, split=None):
    label, *more_labels = sorted(labels)
    digest = hashlib.sha256((content or name).encode()).hexdigest()
    return ScannedImage(name, "pets", label, digest, official_split=split, other_classes=tuple(more_labels))


LABELS = ("bird", "cat", "dog", "fox")


@given(
    st.lists(st.sets(st.sampled_from(LABELS), min_size=1), min_size=1, max_size=40),
    st.integers(1, 3),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_every_class_has_its_shots_and_a_test_image(labels, shots, seed, random):
    images = [scanned(f"{number}.png", *names) for number, names in enumerate(labels)]
    classes = {"pets": sorted({name for names in labels for name in names})}
    try:
        splits = sample_multi_label_splits(images, classes, shots, seed)
    except UserError:
        counts = Counter(name for names in labels for name in names)
        # It may fail where classes that always occur together are scarce, never where all have plenty.
        assert min(counts.values()) <= shots * len(classes["pets"])
        return
    for part, least in ((splits.train, shots), (splits.test, 1)):
        counts = Counter(name for image in part for name in image.class_folders)
        assert all(counts[name] >= least for name in classes["pets"])
    assert {image.path for image in (*splits.train, *splits.test)} == {image.path for image in images}
    assert len(splits.train) + len(splits.test) == len(images)
    # No image of the training set is superfluous when it was taken, so they are few.
    assert len(splits.train) <= shots * len(classes["pets"])
    shuffled = random.sample(images, len(images))
    assert sample_multi_label_splits(shuffled, classes, shots, seed) == splits


@given(st.lists(st.sampled_from(LABELS[:3]), min_size=12, max_size=30), st.integers(0, 5))
def test_with_one_label_each_the_splits_are_those_of_one_label(labels, seed):
    images = [scanned(f"{number}.png", name) for number, name in enumerate([*LABELS[:3] * 3, *labels])]
    classes = {"pets": list(LABELS[:3])}
    assert sample_multi_label_splits(images, classes, 2, seed) == sample_splits(images, classes, 2, seed)


def test_duplicates_of_training_images_and_official_splits():
    images = [scanned(f"{n}.png", "cat", "dog", split="train") for n in range(3)]
    images += [scanned("copy.png", "cat", content="0.png", split="test")]
    images += [scanned(f"test {n}.png", label, split="test") for n, label in enumerate(("cat", "dog"))]
    splits = sample_multi_label_splits(images, {"pets": ["cat", "dog"]}, 3, 1)
    assert [image.path for image in splits.train] == ["0.png", "1.png", "2.png"]
    assert [image.path for image in splits.test] == ["test 0.png", "test 1.png"]
    assert splits.duplicates == (("copy.png", "0.png"),)


def test_classes_with_too_few_images_are_named():
    images = [scanned(f"{n}.png", "cat", "dog") for n in range(4)] + [scanned("fox.png", "fox", "cat")]
    with pytest.raises(UserError, match="pets/fox has 1 image, of which 0 can train"):
        sample_multi_label_splits(images, {"pets": ["cat", "dog", "fox"]}, 2, 1)


# --- Losses --------------------------------------------------------------------------------------------------


def test_losses_are_the_negative_log_likelihood_of_the_labels():
    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = label_tensor([[0], [1, 2], [0, 1, 2], [2], [0, 2]], 3)
    probability = 1 / (1 + (-logits).exp())
    expected = -(labels * probability.log() + (1 - labels) * (1 - probability).log()).sum(dim=1)
    torch.testing.assert_close(image_losses(logits, labels), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(summed_loss(logits, labels), expected.sum(), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(summed_loss(logits, labels), logits)
    torch.testing.assert_close(gradient, (probability - labels).detach(), rtol=0, atol=1e-12)


@given(st.integers(0, 100), st.floats(0.1, 100))
def test_the_bias_gives_the_labels_frequency(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = 25 + scale * torch.randn(20, 4, dtype=torch.float64, generator=generator)
    labels = (torch.rand(20, 4, generator=generator) < 0.3).float()
    labels[0, 0], labels[0, 1] = 1, 0
    bias = prior_bias(logits, labels)
    assert (logits + bias).sigmoid().mean().item() == pytest.approx(labels.double().mean().item(), abs=1e-9)


def test_feature_affinity_counts_an_image_in_each_of_its_classes():
    rng = np.random.default_rng(1)
    features = [rng.normal(size=(7, 5)) for _ in range(3)]
    single = [np.array([0, 1, 2, 0, 1, 2, 0]) for _ in range(3)]
    several = [np.eye(4, dtype=int)[labels] for labels in single]  # a class without an image too
    np.testing.assert_allclose(feature_affinity(features, several), feature_affinity(features, single), atol=1e-12)
    several[0][0] = [1, 1, 0, 0]
    unit = features[0] / np.linalg.norm(features[0], axis=1, keepdims=True)
    by_hand = np.mean([unit[[0, 3, 6]].mean(0), unit[[0, 1, 4]].mean(0), unit[[2, 5]].mean(0)], axis=0)
    centroids = [
        np.mean([(x / np.linalg.norm(x, axis=1, keepdims=True))[labels == c].mean(0) for c in range(3)], axis=0)
        for x, labels in zip(features[1:], single[1:])
    ]
    centered = np.stack([by_hand, *centroids]) - np.mean([by_hand, *centroids], axis=0)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    np.testing.assert_allclose(feature_affinity(features, several), centered @ centered.T, atol=1e-12)


# --- mAP -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(2, 25), st.sampled_from([2, 5, 1000]))
def test_map_is_that_of_scikit_learn_and_its_jackknife_is_exact(seed, num_images, num_values):
    rng = np.random.default_rng(seed)
    has_label = rng.random((num_images, 3)) < 0.4
    has_label[rng.integers(num_images)] = True
    probabilities = rng.integers(0, num_values, (num_images, 3)) / num_values  # few values: many ties
    scores = MultiLabelScores(("a", "b", "c"), has_label, probabilities)
    expected = average_precision_score(has_label, probabilities, average="macro")
    assert scores.value == pytest.approx(expected, abs=1e-9)
    for image in range(num_images):
        remaining = np.arange(num_images) != image
        present = [c for c in range(3) if has_label[remaining, c].any()]
        values = [average_precision_score(has_label[remaining, c], probabilities[remaining, c]) for c in present]
        assert scores.without_image[image] == pytest.approx(np.mean(values) if values else expected, abs=1e-9)


def test_the_standard_error_is_near_that_of_many_test_sets():
    rng = np.random.default_rng(0)

    def draw() -> MultiLabelScores:
        has_label = rng.random((200, 2)) < 0.3
        return MultiLabelScores(("a", "b"), has_label, has_label + rng.normal(size=(200, 2)))

    samples = [draw() for _ in range(200)]
    spread = np.std([scores.value for scores in samples])
    assert np.mean([scores.standard_error for scores in samples]) == pytest.approx(spread, rel=0.2)


def test_differences_are_paired_image_by_image():
    rng = np.random.default_rng(0)
    has_label = rng.random((50, 3)) < 0.4
    a, b = (MultiLabelScores(("a", "b", "c"), has_label, has_label + rng.normal(size=(50, 3))) for _ in range(2))
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(a.value - b.value)
    assert difference.standard_error == pytest.approx(jackknife_standard_error(a.without_image - b.without_image))
    assert paired_difference(a, a) == (0, 0)


# --- Runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory, digits):
    """Images of one of four digits, or of two side by side, in two domains, as a table."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(3)
    lines = ["path,task,label"]
    for task in ("ink_left", "ink_right"):
        files = {name: sorted((digits / task / "test" / name).glob("*.png")) for name in DIGITS}
        for number in range(96):
            names = rng.choice(DIGITS, size=1 + (number % 3 == 0), replace=False)
            page = Image.new("RGB", (32, 32))
            for side, name in enumerate(names):
                with Image.open(files[name][number % len(files[name])]) as digit:
                    page.paste(digit.resize((32 // len(names), 32)), (16 * side, 0))
            path = f"{task} {number}.png"
            page.save(folder / path)
            lines.append(f"{path},{task},{';'.join(names)}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_job, table):
    """Storage and output of a run on the table."""
    storage = tmp_path_factory.mktemp("multi label run") / "storage"
    finished = run_job(
        "full_pipeline",
        *("--storage", storage, "--config", "configs/demo.yaml", "--data.root", table, "--data.multi_label", "true"),
        *("--data.use_official_splits", "false", "--data.shots", "8", "--baselines", "[linear_probe]"),
        *("--training.epochs", "8", "--global_prompt.epochs", "3"),
    )
    assert finished.status == 0, finished.output
    return storage, finished.output


def test_a_table_with_several_labels_goes_through_the_whole_pipeline(run):
    storage, output = run
    folder, methods = the_run(storage), summary(storage)["methods"]
    assert "several labels per image" in output and "test mAP (%)" in output and "accuracy" not in output
    predictions = pq.read_table(folder / "report/predictions.parquet").to_pylist()
    for name, result in methods.items():
        assert "accuracy" not in result and set(result["mAP"]) == {"ink_left", "ink_right"}
        for task, value in result["mAP"].items():
            rows = [row for row in predictions if (row["method"], row["task"]) == (name, task)]
            truth = np.array([[digit in row["true_labels"] for digit in DIGITS] for row in rows])
            probabilities = np.array([[dict(row["probabilities"])[digit] for digit in DIGITS] for row in rows])
            assert value == pytest.approx(average_precision_score(truth, probabilities), abs=1e-9)
            assert 0 < result["standard_error"][task] < 0.2
            loss = -np.where(truth, np.log(probabilities), np.log1p(-probabilities)).sum(axis=1).mean()
            assert result["test_loss"][task] == pytest.approx(loss, rel=1e-5)
            for row in rows:
                assert row["labels"] == [digit for digit, value in row["probabilities"] if value >= 0.5]
    for name in ("linear_probe", "all_in_one"):
        assert methods[name]["average_test_loss"] < methods["zero_shot"]["average_test_loss"]
        assert methods[name]["average"] > methods["zero_shot"]["average"]
    page = (folder / "report/report.html").read_text()
    assert "Mean average precision" in page and "Average precision of each class" in page
    assert (folder / "report/class_precision.parquet").is_file()
    assert not (folder / "report/confusions.parquet").exists()


def test_predictions_have_all_labels_above_the_threshold(run, table):
    storage, _ = run
    opened = pipeline.open_run(the_run(storage))
    with pytest.raises(UserError, match="mean_average_precision"):
        _ = opened.accuracy
    with pytest.raises(UserError, match="has no confusions"):
        opened.confusion_matrix("ink_left")
    assert opened.mean_average_precision.loc["ink_left", "grouped"] > 0 and "mAP" in repr(opened)
    assert set(opened.class_precision["label"]) == set(DIGITS)
    rows = opened.predictions
    row = rows[(rows["method"] == "grouped") & (rows["task"] == "ink_left")].iloc[0]
    model = opened.load()
    prediction = model.predict(str(table.parent / row["path"]), "ink_left")
    assert prediction.probabilities == pytest.approx(dict(row["probabilities"]), abs=1e-4)
    expected = [name for name, value in prediction.probabilities.items() if value >= 0.5]
    assert prediction.label == (";".join(expected) or None)
    assert prediction.probability == max(prediction.probabilities.values())
    low = opened.load(threshold=0.0).predict(str(table.parent / row["path"]), "ink_left")
    assert low.label == ";".join(model.labels("ink_left"))
    with pytest.raises(UserError, match="several labels"):
        model.calibrate([str(table.parent / row["path"])], ["one"], "ink_left")
    adapter = load_adapter(the_run(storage) / "adapters/grouped.safetensors")
    assert set(adapter.logit_biases) == {"ink_left", "ink_right"}


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("full_pipeline", ("--baselines", "[promptsrc]")),
        ("tune", ("--search", "configs/searches/demo.yaml")),
        ("grouping_study", ()),
    ],
)
def test_what_takes_one_label_per_image_refuses_before_any_work(run_job, run, table, tmp_path, job, options):
    storage = tmp_path / "storage"
    finished = run_job(
        job,
        *("--storage", storage, "--config", "configs/demo.yaml", "--data.root", table, "--data.multi_label", "true"),
        *("--data.use_official_splits", "false", *options),
    )
    assert finished.status == 2 and "one label per image" in finished.output
    assert not (storage / "splits").exists()


def test_a_task_cannot_be_added(run_job, run):
    storage, _ = run
    finished = run_job("add_task", "--run", the_run(storage), "--task", "more")
    assert finished.status == 2 and "one label per image" in finished.output


def test_benchmark_tables_name_the_metric(run_job, table, tmp_path):
    storage = tmp_path / "storage"
    finished = run_job(
        "benchmark",
        *("--storage", storage, "--config", "configs/demo.yaml", "--data.root", table, "--data.multi_label", "true"),
        *("--data.use_official_splits", "false", "--methods", "zero_shot", "linear_probe"),
        *("--linear_probe.training.epochs", "2"),
    )
    assert finished.status == 0, finished.output
    (file,) = storage.glob("benchmarks/*/benchmark.csv")
    assert ",mAP,trained_parameters,paper_mAP" in file.read_text()
    assert (
        "test mAP (%)" in file.with_suffix(".md").read_text() and "accuracy" not in file.with_suffix(".md").read_text()
    )
