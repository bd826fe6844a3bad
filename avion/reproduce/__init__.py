"""The paper's tables: recipes of their rows, commands, and what came out beside what the paper says."""
