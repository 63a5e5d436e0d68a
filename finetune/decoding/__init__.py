"""Models as they are used: loaded, asked, sped up by a draft."""
