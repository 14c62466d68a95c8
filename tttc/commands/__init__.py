"""What the commands of ``tttc`` do, one file each; :mod:`tttc.cli` parses."""
