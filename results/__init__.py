"""Records of runs: one JSON file each, and the leaderboard that is made from them."""
