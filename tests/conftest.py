"""Shared test helpers: fixed seeds, the optional shared folder, and the opt-in `full` tests."""

import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: small tensors are fastest on one thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def shared_path(relative):
    """Path of a file of the shared folder ($ZSAD_SHARED, else `../shared`), or of the part of it kept here; skips when
    it is in neither."""
    shared = Path(os.environ.get("ZSAD_SHARED") or ROOT.parent / "shared")
    for base in (shared, ROOT / "tests"):
        if (base / relative).exists():
            return base / relative
    pytest.skip(f"shared file {relative} is not there (set ZSAD_SHARED to the folder that holds it)")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked `full` (minutes each)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="marked full: run pytest --full")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """How many attacks of each kind were tried and stood (not across the processes of -n)."""
    for what, (tries, passed) in getattr(sys.modules.get("test_attack"), "TALLY", {}).items():
        terminalreporter.write_line(f"{what}: {tries} tried, {passed} passed")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A tiny StableDiffusionPipeline directory, with a PNDM scheduler as Stable Diffusion ships it."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from tiny import tiny_parts, tiny_scheduler

    vae, unet, text_encoder, tokenizer = tiny_parts()
    scheduler = PNDMScheduler.from_config(tiny_scheduler().config, skip_prk_steps=True)
    parts = (vae, text_encoder, tokenizer, unet, scheduler, None, None)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_pixel(tmp_path_factory):
    """A tiny DDPMPipeline directory."""
    from diffusers import DDPMPipeline, DDPMScheduler
    from tiny import tiny_unet

    folder = tmp_path_factory.mktemp("models") / "tiny"
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    return folder
