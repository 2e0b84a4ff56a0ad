import errno
import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ftkit.distributed import World
from ftkit.errors import StorageError, UserError
from ftkit.training import checkpoint as checkpoints
from ftkit.training.checkpoint import (
    check_world,
    find_damage,
    list_checkpoints,
    load_optimizer,
    load_random,
    newest_verified,
    optimizer_tensors,
    random_tensors,
    read_checkpoint,
    rotate,
    set_aside_later,
    write_checkpoint,
)


def write(directory, step, **state):
    def weights(staging):
        (staging / "adapter").mkdir()
        (staging / "adapter" / "weights.bin").write_bytes(bytes([step % 256]) * 64)

    tensors = {"w.step": torch.tensor(1.0)}
    return write_checkpoint(directory, step, write_weights=weights, optimizer=tensors, random=tensors, state=state)


def test_a_written_checkpoint_is_whole_and_carries_its_state(tmp_path):
    path = write(tmp_path, 3, best_metric=0.1)
    assert path.name == "step-00000003"
    found = read_checkpoint(path)
    assert found.step == 3
    assert found.state["best_metric"] == 0.1


@pytest.mark.parametrize("name", ["adapter/weights.bin", "optimizer.safetensors", "random.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_every_kind_of_damage_is_found_and_an_older_checkpoint_is_used(tmp_path, name, damage):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    assert name in find_damage(path)
    warnings = []
    assert newest_verified(tmp_path, warnings.append).step == 1
    assert "damaged" in warnings[0]
    with pytest.raises(UserError, match="not a valid checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "manifest",
    [
        "", "not json", "[]", "{}", "null", "3", '{"state.json": null}', '{"adapter/weights.bin": {"bytes": 64}}',
        lambda manifest: json.dumps({name: None for name in manifest}),
        lambda manifest: json.dumps({name: {} for name in manifest}),
        lambda manifest: json.dumps({name: {"bytes": "64", "sha256": 1} for name in manifest}),
        lambda manifest: json.dumps(manifest | {"..": manifest["state.json"]}),
        lambda manifest: json.dumps({n: measured for n, measured in manifest.items() if n != "state.json"}),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none_is_damage(tmp_path, manifest):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / "manifest.json"
    file.write_text(manifest if isinstance(manifest, str) else manifest(json.loads(file.read_text())))
    assert find_damage(file.parent)
    warnings = []
    assert newest_verified(tmp_path, warnings.append).step == 1
    assert len(warnings) == 1
    assert "damaged" in warnings[0]


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    path = write(tmp_path, 1)

    def fail(file, digest):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    assert "cannot be read (Input/output error)" in find_damage(path)


def test_without_a_manifest_it_is_none(tmp_path):
    path = write(tmp_path, 1)
    (path / "manifest.json").unlink()
    assert newest_verified(tmp_path, lambda text: None) is None


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(28, "No space left on device"), StorageError, "checkpoint of step 2: No space left on device; free"),
        (Exception("No space left on device (os error 28)"), StorageError, "step 2: No space left on device; free"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failed_write_leaves_nothing_and_older_ones_alone(tmp_path, error, expected, message):
    write(tmp_path, 1)

    def weights(staging):
        (staging / "half").write_bytes(b"half")
        raise error

    with pytest.raises(expected, match=message):
        write_checkpoint(tmp_path, 2, write_weights=weights, optimizer={}, random={}, state={})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert find_damage(tmp_path / "step-00000001") is None


def test_rotation_keeps_the_newest_and_the_best_and_sweeps_what_a_kill_left(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    (tmp_path / f"{checkpoints.STAGING}00000009").mkdir()
    rotate(tmp_path, keep=2, best=tmp_path / "step-00000002")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{n:08d}" for n in (2, 4, 5)]


def test_what_was_set_aside_or_copied_is_never_counted_read_or_removed(tmp_path):
    for step in (1, 2, 3, 99999999, 100000000):
        write(tmp_path, step)
    set_aside_later(read_checkpoint(tmp_path / "step-00000002"))
    set_aside = {f"step-{name}.old-1" for name in ("00000003", "99999999", "100000000")}
    mine = {"step-00000001-copy", "step-00000002.bak", "step-best", "notes"}
    for name in mine:
        shutil.copytree(tmp_path / "step-00000002", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"} | set_aside | mine
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]

    write(tmp_path, 3)
    assert newest_verified(tmp_path, pytest.fail).step == 3
    rotate(tmp_path, keep=1, best=None)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003"} | set_aside | mine
    for name in ("step-00000003.old-1", "step-00000001-copy"):
        with pytest.raises(UserError, match="set aside, or is a copy"):
            read_checkpoint(tmp_path / name)


def test_checkpoints_are_counted_in_the_order_of_their_steps(tmp_path):
    for step in (100000000, 99999999):
        write(tmp_path, step)
    assert newest_verified(tmp_path, pytest.fail).step == 100000000
    rotate(tmp_path, keep=1, best=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-100000000"]


def test_a_checkpoint_goes_on_only_with_as_many_processes_on_the_same_kind_of_device(tmp_path):
    world = World()
    path = write_checkpoint(
        tmp_path, 1, write_weights=lambda p: None, optimizer={}, random=random_tensors(world), state={}
    )
    checkpoint = read_checkpoint(path)
    check_world(checkpoint, world)
    for size, device in ((2, "cpu"), (1, "cuda")):
        with pytest.raises(UserError, match=rf"1 process\(es\) on CPU, and this run has {size} on {device}"):
            check_world(checkpoint, SimpleNamespace(size=size, device=torch.device(device)))


def test_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 1, round=1)
    write(tmp_path, 1, round=2)
    assert read_checkpoint(list_checkpoints(tmp_path)[0]).state["round"] == 2


def test_adamw_goes_on_bit_for_bit(tmp_path):
    def trained(steps, optimizer, parameters, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    def fresh():
        parameters = {"a": nn.Parameter(torch.ones(3, 3)), "b": nn.Parameter(torch.ones(3))}
        return parameters, torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)

    parameters, optimizer = fresh()
    trained(3, optimizer, parameters, seed=0)
    write_checkpoint(
        tmp_path,
        3,
        write_weights=lambda p: None,
        optimizer=optimizer_tensors(optimizer, parameters),
        random={},
        state={},
    )
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    trained(3, optimizer, parameters, seed=1)

    again, optimizer = fresh()
    with torch.no_grad():
        for name, value in kept.items():
            again[name].copy_(value)
    load_optimizer(optimizer, again, tmp_path / "step-00000003")
    trained(3, optimizer, again, seed=1)
    assert all(torch.equal(parameters[name], again[name]) for name in parameters)


def test_generators_go_on_where_they_were(tmp_path):
    world = World()
    write_checkpoint(tmp_path, 1, write_weights=lambda p: None, optimizer={}, random=random_tensors(world), state={})
    expected = torch.rand(5)
    torch.rand(100)
    load_random(tmp_path / "step-00000001", world)
    assert torch.equal(torch.rand(5), expected)
    shutil.rmtree(tmp_path)
