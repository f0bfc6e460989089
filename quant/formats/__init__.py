"""Storage formats, one file each; discovery lists this folder."""
