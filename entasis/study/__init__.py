"""Arms × seeds at equal cost: plan, execute, judge, report."""
