"Checks that `pytest --cov` covered at least `fail_under` percent of the lines, and of the branches."
import json, sys
from pathlib import Path
from coverage import Coverage

report,cov = Path('build/coverage.json'),Coverage()
cov.load()
cov.json_report(outfile=str(report))
lines,branches = [json.loads(report.read_text())['totals'][f'percent_{o}_covered'] for o in ('statements','branches')]
print(f'coverage: {lines:.1f} % of lines, {branches:.1f} % of branches')
sys.exit(min(lines, branches) < cov.get_option('report:fail_under'))
