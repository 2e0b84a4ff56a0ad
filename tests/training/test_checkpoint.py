import shutil

import pytest
import torch
from torch import nn

from ftkit.distributed import World
from ftkit.errors import StorageError, UserError
from ftkit.training import checkpoint as checkpoints
from ftkit.training.checkpoint import (
    find_damage,
    list_checkpoints,
    load_optimizer,
    load_random,
    newest_verified,
    optimizer_tensors,
    random_tensors,
    read_checkpoint,
    rotate,
    write_checkpoint,
)


def write(directory, step, **state):
    def weights(staging):
        (staging / "adapter").mkdir()
        (staging / "adapter" / "weights.bin").write_bytes(bytes([step]) * 64)

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


def test_without_a_manifest_it_is_none(tmp_path):
    path = write(tmp_path, 1)
    (path / "manifest.json").unlink()
    assert newest_verified(tmp_path, lambda text: None) is None


def test_a_failed_write_leaves_nothing_and_older_ones_alone(tmp_path):
    write(tmp_path, 1)

    def weights(staging):
        (staging / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        write_checkpoint(tmp_path, 2, write_weights=weights, optimizer={}, random={}, state={})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert find_damage(tmp_path / "step-00000001") is None


def test_rotation_keeps_the_newest_and_the_best_and_sweeps_what_a_kill_left(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    (tmp_path / f"{checkpoints.STAGING}00000009").mkdir()
    rotate(tmp_path, keep=2, best=tmp_path / "step-00000002")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{n:08d}" for n in (2, 4, 5)]


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
