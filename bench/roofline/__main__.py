"""`python -m bench.roofline`: the least time a step can take, part by part, from a device's records or from two rates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from bench.ceilings import Ceilings
from bench.report.devices import Device, load
from bench.report.devices import Setting as Measured
from bench.roofline.page import ceilings_of, page
from bench.roofline.setting import Setting, setting_of
from loop.cli import guarded, parse
from loop.errors import UserError

ABOUT = "Bytes, FLOPs, launches and least time of every part of a training step."


@dataclass(frozen=True)
class Command(Setting):
    """Flags of `python -m bench.roofline`. What is not given is as in the device's newest run of that setting."""

    device_slug: str | None = None  # a device with records: its ceilings, its efficiencies, and a check against its times
    copy_tb_s: float | None = None  # copy bandwidth, TB/s read plus written, instead of a device
    matmul_tflops: float | None = None  # matrix-product rate, TFLOP/s, instead of a device
    reports: Path = Path("reports")  # the folder of reports; its folder `data` holds the records


def main(argv: list[str] | None = None) -> int:
    """Prints the page. Raises UserError for what the user must put right."""
    command = parse(Command(), "python -m bench.roofline", ABOUT, argv)
    if command.device_slug is None:
        print(page(_setting(command), _given(command), "a device of these rates"), end="")
        return 0
    if command.copy_tb_s is not None or command.matmul_tflops is not None:
        raise UserError("--device-slug has its rates in its records; leave --copy-tb-s and --matmul-tflops out")
    device = _device(command)
    measured = _measured(device, command)
    ceilings = None if measured.reference is None else ceilings_of(measured.reference)
    if ceilings is None:
        raise UserError(f"--device-slug {device.slug}: its newest run has no reference with measured rates")
    recorded = setting_of(measured.reference)
    if recorded is not None:
        command = parse(dataclasses.replace(command, **vars(recorded)), "python -m bench.roofline", ABOUT, argv)
    setting = _setting(command)
    print(page(setting, ceilings, device.name, measured.current), end="")
    return 0


def _measured(device: Device, command: Command) -> Measured:
    """What was measured of the model and method at hand, else the first setting, whose rates are the device's as well."""
    wanted = (command.model, command.method)
    fitting = [measured for measured in device.settings if (measured.trained.model, measured.trained.method) == wanted]
    return (fitting or list(device.settings))[0]


def _setting(command: Command) -> Setting:
    return Setting(**{field.name: getattr(command, field.name) for field in dataclasses.fields(Setting)})


def _given(command: Command) -> Ceilings:
    if command.copy_tb_s is None or command.matmul_tflops is None:
        raise UserError("name a device with records (--device-slug), or give both --copy-tb-s and --matmul-tflops")
    if min(command.copy_tb_s, command.matmul_tflops) <= 0:
        raise UserError("--copy-tb-s and --matmul-tflops must be above 0")
    return Ceilings(command.copy_tb_s * 1e12, command.matmul_tflops * 1e12, 0, 0, command.dtype)


def _device(command: Command) -> Device:
    devices = {device.slug: device for device in load(command.reports / "data")}
    if command.device_slug not in devices:
        raise UserError(f"--device-slug {command.device_slug}: no records of it; there are {', '.join(devices) or 'none'}")
    return devices[command.device_slug]


if __name__ == "__main__":
    guarded(main)
