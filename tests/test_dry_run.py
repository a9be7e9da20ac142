"""--dry_run and --profile_steps: what they tell, and that a dry run writes nothing."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from errors import UserError
from run import dry_run, profile
from tests.helpers import final_tensors, losses, make_config, make_data, run_train
from tests.test_resume import files_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "small", 4000, 300)


@pytest.fixture
def config(tmp_path, data):
    return make_config(tmp_path / "tiny.py", data=str(data), out_dir=str(tmp_path / "run"), max_steps=6,
                       hidden_size=16, num_hidden_layers=2)
