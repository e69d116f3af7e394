"""The report's Jinja template. A Python file, because a Flower app bundle holds no .html."""

# ruff: noqa: E501  a cell on one line reads better than one that is broken

TEMPLATE = """\
{%- macro dot(look) -%}{% if look %}<i class="{{ look[0] }}" aria-hidden="true">{{ look[1] }}</i> {% endif %}{%- endmacro -%}
{%- macro legend(entries) -%}
  <div class="legend">{% for entry in entries %}<span>{{ dot(entry.look) }}{{ entry.name }}</span> {% endfor %}</div>
{%- endmacro -%}
{%- macro head(title, part) -%}
  <h2>{{ title }}</h2>
  <p class="note{% if "missing" in part %} missing{% endif %}">{{ part.missing if "missing" in part else part.note }}</p>
{%- endmacro -%}
{%- macro heat(heads, rows, diagonal) -%}
  <table class="heat">
    <thead><tr><th></th>{% for name in heads %}<th>{{ name }}</th>{% endfor %}</tr></thead>
    <tbody>
    {%- for name, cells in rows %}
      {%- set row = loop.index %}
      <tr><th>{{ name }}</th>{% for text, shade in cells %}{% if diagonal or loop.index != row %}<td style="--s:{{ shade }}">{{ text }}</td>{% else %}<td></td>{% endif %}{% endfor %}</tr>
    {%- endfor %}
    </tbody>
  </table>
{%- endmacro -%}
{%- macro charts(entries) -%}
  <div class="grid">
    {%- for chart in entries %}
    <section class="card chart">
      <h3>{{ chart.title }}</h3>
      <p class="note{% if not chart.svg %} missing{% endif %}">{{ chart.note }}</p>
      {{ chart.svg }}
    </section>
    {%- endfor %}
  </div>
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
{%- if together %}
<header id="top">
  <h1>{{ runs | length }} runs side by side</h1>
  <nav>{% for run in runs %}<a href="#run-{{ loop.index }}">{{ run.name }}</a> {% endfor %}</nav>
</header>
<section id="comparison">
  {%- for verdict in together.verdicts %}
  <p><b>{{ verdict }}</b></p>
  {%- endfor %}
  <div class="card scroll">
    <table class="wide">
      <thead><tr><th>run</th><th class="left">strategy</th><th>clients</th><th>valid.<br>%</th>
        <th>unseen<br>mean %</th><th>unseen<br>worst %</th><th>ensemble<br>%</th><th>up</th><th>down</th>
        <th>time</th><th class="left">status</th></tr></thead>
      <tbody>
      {%- for row in together.rows %}
        <tr><td>{{ dot(row.look) }}{{ row.name }}</td><td class="left">{{ row.strategy }}</td>
          {% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}<td class="left {{ row.status }}">{{ row.status }}</td></tr>
      {%- endfor %}
      </tbody>
    </table>
  </div>
  <h2>Curves</h2>
  {{ legend(together.legend) }}
  {{ charts(together.charts) }}
  <h2>What differs</h2>
  {%- if together.differences %}
  <div class="card scroll">
    <table>
      <thead><tr><th>setting</th>{% for run in runs %}<th class="left">{{ run.name }}</th>{% endfor %}</tr></thead>
      <tbody>
      {%- for key, values in together.differences %}
        <tr><td><code>{{ key }}</code></td>{% for value in values %}<td class="left">{{ value }}</td>{% endfor %}</tr>
      {%- endfor %}
      </tbody>
    </table>
  </div>
  {%- else %}
  <p class="note missing">No setting differs: these are repetitions.</p>
  {%- endif %}
</section>
{%- endif %}
{%- for run in runs %}
<article class="run" id="run-{{ loop.index }}">
  <header>
    <h1>{{ run.name }} <span class="badge {{ run.summary.status }}">{{ run.summary.status }}</span></h1>
    <p class="soft">{{ run.summary.strategy }}{% if run.summary.experiment %}, experiment {{ run.summary.experiment }}{% endif %}{% if run.date %}, {{ run.date }}{% endif %}</p>
  </header>
  {%- if runs | length == 1 %}
  <p class="note">{{ run.verdict }}</p>
  {%- endif %}
  {%- if run.summary.reason %}
  <div class="warn"><p>{{ run.summary.reason }}</p></div>
  {%- endif %}
  <div class="tiles">
    {%- for label, value in run.tiles %}
    <div class="tile"><b>{{ value }}</b><span>{{ label }}</span></div>
    {%- endfor %}
  </div>
  {%- if run.summary.warnings or run.summary.rejected %}
  <div class="warn">
    <ul>
    {%- for warning in run.summary.warnings %}<li>{{ warning }}</li>{% endfor %}
    {%- for line in run.summary.rejected[:12] %}
      <li>Round {{ line.round }}, {{ line.client or "node " ~ line.node_id }}: report rejected: {{ line.reason }}</li>
    {%- endfor %}
    {%- if run.summary.rejected | length > 12 %}<li>and {{ run.summary.rejected | length - 12 }} more rejected reports</li>{% endif %}
    </ul>
  </div>
  {%- endif %}
  <pre>{{ run.command }}</pre>

  <h2>Clients</h2>
  {%- if run.table.rows %}
  <div class="card scroll{% if run.table.rows | length > 24 %} tall{% endif %}">
    <table class="wide clients">
      <thead><tr><th>client</th><th>valid.<br>%</th><th>unseen<br>%</th><th>balanced<br>%</th><th>AUROC<br>%</th>
        <th>images</th><th>up</th><th>down</th><th class="left">model</th></tr></thead>
      <tbody>
      {%- for look, row in run.table.rows %}
        <tr{% if not row.finished %} class="unfinished"{% endif %}><td>{{ dot(look) }}{{ row.name }}
          {%- if not row.finished %} (did not finish){% endif %}</td>
          {% for figure in row.figures %}<td>{{ figure }}</td>{% endfor %}
          <td>{{ row.images }}</td>{% for sent in row.traffic %}<td>{{ sent }}</td>{% endfor %}<td class="left">{{ row.model }}</td></tr>
      {%- endfor %}
      </tbody>
      <tfoot>
      {%- for row in run.table.feet %}
        <tr><td>{{ row.name }}</td>{% for figure in row.figures %}<td>{{ figure }}</td>{% endfor %}<td></td>
          {% for sent in row.traffic %}<td>{{ sent }}</td>{% endfor %}<td class="left">{{ row.model }}</td></tr>
      {%- endfor %}
      </tfoot>
    </table>
  </div>
  {%- if run.table.unseen %}
  <p class="note">Unseen: {{ "{:,}".format(run.table.unseen) }} images that no client has trained on.</p>
  {%- endif %}
  {%- if run.lacking %}
  <p class="note">{{ run.lacking }}</p>
  {%- endif %}
  {%- else %}
  <p class="note missing">No client has reported.</p>
  {%- endif %}

  <h2>Curves</h2>
  {{ legend(run.legend) }}
  {{ charts(run.charts) }}

  {{ head("Confusion", run.confusion) }}
  {%- if "matrices" in run.confusion %}
  <div class="small" style="--least: {{ 250 if run.confusion.many else 100 + 68 * (run.confusion.classes | length) }}px">
    {%- for matrix in run.confusion.matrices %}
    <section class="card">
      <h3>{{ matrix.name }} <span class="soft">{{ matrix.accuracy }} %</span></h3>
      <div class="scroll">
      {%- if run.confusion.many %}
      <table>{% for actual, chosen, count in matrix.rows %}<tr><td>{{ actual }}</td><td class="left">{{ chosen }}</td><td>{{ count }}</td></tr>{% endfor %}</table>
      {%- else %}
      {{ heat(run.confusion.classes, matrix.rows, true) }}
      {%- endif %}
      </div>
    </section>
    {%- endfor %}
  </div>
  {%- endif %}

  {{ head("Recall by class and client", run.recall) }}
  {%- if "rows" in run.recall %}
  <div class="card scroll">{{ heat(run.recall.heads, run.recall.rows, true) }}</div>
  {%- endif %}

  {{ head("Unseen images predicted wrong", run.mistakes) }}
  {%- if "mistakes" in run.mistakes %}
  <div class="grid">
    {%- for mistake in run.mistakes.mistakes %}
    <section class="card sample">
      <img src="{{ mistake.picture }}" alt="unseen image {{ mistake.name }}" width="96" height="96">
      <div>
        <div class="name">{{ mistake.name }}</div>
        <div><b>{{ mistake.predicted }}</b> {{ mistake.probability }} %</div>
        <div class="note">the source says {{ mistake.label }}</div>
      </div>
    </section>
    {%- endfor %}
  </div>
  {%- endif %}

  {{ head("Agreement between clients", run.agreement) }}
  {%- if "rows" in run.agreement %}
  <div class="card scroll">{{ heat(run.agreement.heads, run.agreement.rows, false) }}</div>
  {%- endif %}

  {{ head("Public samples in dispute", run.disputed) }}
  {%- if "samples" in run.disputed %}
  <div class="grid">
    {%- for sample in run.disputed.samples %}
    <section class="card sample">
      <img src="{{ sample.picture }}" alt="public sample {{ sample.name }}" width="96" height="96">
      <div>
        <div class="name">{{ sample.name }}</div>
        <div class="note">{{ sample.divergence }} nats{% if sample.label %}; the source says {{ sample.label }}{% endif %}</div>
        <div class="sides">
          {%- for side in sample.sides %}
          <div><b>{{ side.name }}</b>: {% for look, voter in side.clients %}<span class="voter">{{ dot(look) }}{{ voter }}</span> {% else %}{{ side.count }} clients{% endfor %}</div>
          {%- endfor %}
        </div>
      </div>
    </section>
    {%- endfor %}
  </div>
  {%- endif %}

  {{ head("What the server could tell", run.leaks) }}
  {%- if "rows" in run.leaks %}
  <div class="card scroll">
    <table>
      <tr><th class="left">what</th><th class="left">how well</th><th class="left">note</th></tr>
      {%- for what, how, note in run.leaks.rows %}
      <tr><td class="left">{{ what }}</td><td class="left">{{ how }}</td><td class="left">{{ note }}</td></tr>
      {%- endfor %}
    </table>
  </div>
  {%- endif %}

  <h2>Settings and versions</h2>
  <details>
    <summary>All settings</summary>
    <div class="keys">
      {%- for group, rows in run.settings %}
      <div><h3>{{ group }}</h3>
      <table>{% for key, value in rows %}<tr><td><code>{{ key }}</code></td><td>{{ value }}</td></tr>{% endfor %}</table></div>
      {%- endfor %}
    </div>
  </details>
  <p class="note">{% for name, version in run.summary.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}
    {%- if run.summary.public_digest %}; public set <code>{{ run.summary.public_digest }}</code>{% endif %}. Folders are left out: a report can be passed on,
    and shows the samples above.</p>
</article>
{%- endfor %}
</main>
</body>
</html>
"""
