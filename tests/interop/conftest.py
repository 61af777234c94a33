"""For the tests of import and export."""

import os
import tempfile

# transformers copies the code of every folder that it opens to here, several processes at once to the same names.
_CODE = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = _CODE.name
