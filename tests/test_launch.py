import pytest

from ftkit.errors import UserError
from ftkit.launch import LaunchPlan, read_launch_config


def write(tmp_path, text):
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    return path


def test_processes_are_shared_by_the_machines(tmp_path):
    text = "num_machines: 2\nnum_processes: 16\nmachine_rank: 1\nmain_process_ip: 10.0.0.1\nmain_process_port: 29500\n"
    assert read_launch_config(write(tmp_path, text)) == LaunchPlan(8, 2, 1, "10.0.0.1", 29500)


def test_one_machine_needs_only_a_number(tmp_path):
    assert read_launch_config(write(tmp_path, "num_processes: 4\n")) == LaunchPlan(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_processes: many\n", r"launch.yaml:1: num_processes: expected a whole number"),
        ("num_machines: 2\nnum_processes: 5\n", r"launch.yaml:2: num_processes: 5 processes cannot be shared"),
        ("num_machines: 2\nnum_processes: 4\n", "add main_process_ip and main_process_port"),
        ("- 1\n", "a launch file is a mapping"),
        ("machine_rank: -1\n", "expected a whole number"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_launch_config(write(tmp_path, text))
