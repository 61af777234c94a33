"""For all tests."""

import pytest
import torch

from entasis.model.transformer import Transformer


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What is measured in tests does not stay on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def unset_weights():
    """A model nobody has given weights computes NaN, and not what lay in memory."""
    init = Transformer.__init__

    def unset(self, *args, **kwargs):
        init(self, *args, **kwargs)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "__init__", unset)
        yield
