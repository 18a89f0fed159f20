"""Fails when the install grows past 75 packages or 1.3 GB, the promise of the README."""

import importlib.metadata
import pathlib
import sysconfig

PACKAGES, BYTES = 75, 1.3e9

site = pathlib.Path(sysconfig.get_path('purelib'))
packages = {d.metadata['Name'] for d in importlib.metadata.distributions()}
size = sum(f.stat().st_size for f in site.rglob('*') if f.is_file() and not f.is_symlink())
print(f'{len(packages)} packages, {size / 1e9:.2f} GB')
if len(packages) > PACKAGES or size > BYTES:
  raise SystemExit(f'The install is larger than {PACKAGES} packages or {BYTES / 1e9} GB.')
