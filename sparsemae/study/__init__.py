"""Arms x settings x seeds as one plan: run, resumed after any kill, compared in pairs, reported."""
