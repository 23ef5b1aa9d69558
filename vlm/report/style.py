"""The look of a page: system fonts, light and dark, readable at 1000 pixels and on a phone, and on paper."""

__all__ = ["STYLE"]

STYLE = """
:root{--page:#f5f6f8;--surface:#fff;--ink:#1c2128;--soft:#5c6673;--line:#dfe3e8;--stripe:#f8f9fb;--accent:#2563c9;--good:#14794f;--bad:#c02b38;
--best:#e5f4ec;--shadow:0 1px 2px rgba(20,30,50,.06),0 2px 10px rgba(20,30,50,.04)}
@media(prefers-color-scheme:dark){:root{--page:#0f1216;--surface:#171b21;--ink:#e4e8ee;--soft:#97a2b0;--line:#2c333d;--stripe:#1b2027;
--accent:#7db0ff;--good:#58d29b;--bad:#ff8089;--best:#173427;--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink)}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1002px;margin:0 auto;padding:36px 16px 72px}
header{margin-bottom:28px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.015em;margin:0 0 6px}
h2{font-size:21px;letter-spacing:-.01em;margin:44px 0 12px;scroll-margin-top:12px}
p{margin:10px 0;max-width:74ch}
.subtitle{color:var(--soft);margin:0}
nav{display:flex;flex-wrap:wrap;gap:6px 8px;margin-top:18px}
nav a{color:var(--accent);text-decoration:none;font-size:14px;padding:3px 11px;border-radius:99px}
nav a{border:1px solid var(--line);background:var(--surface)}
nav a:hover{border-color:var(--accent)}
pre{background:var(--surface);border:1px solid var(--line);border-radius:8px;padding:12px 16px}
pre{overflow-x:auto;font-size:13.5px;line-height:1.5}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:18px 0}
.figures div{background:var(--surface);border:1px solid var(--line);border-radius:10px;padding:14px 16px;box-shadow:var(--shadow)}
.figures dt{color:var(--soft);font-size:14px}
.figures dd{margin:2px 0;font-size:29px;line-height:1.2;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.figures small{color:var(--soft);font-size:13px}
.wide{overflow-x:auto;margin:16px 0;background:var(--surface);border:1px solid var(--line);border-radius:10px;box-shadow:var(--shadow)}
table{border-collapse:collapse;width:100%;font-size:15px}
caption{caption-side:bottom;text-align:left;color:var(--soft);font-size:13.5px;padding:9px 16px 11px;border-top:1px solid var(--line)}
th,td{padding:7px 16px;text-align:left;vertical-align:top}
th{font-weight:600;font-size:13.5px;color:var(--soft);border-bottom:1px solid var(--line);vertical-align:bottom}
tbody tr:nth-child(even){background:var(--stripe)}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.best{font-weight:650;background:var(--best);border-radius:5px;padding:1px 7px;margin:-1px -7px}
dd .best{padding:0;margin:0;background:none;color:var(--good)}
.good{color:var(--good);font-weight:600}
.bad{color:var(--bad);font-weight:600}
.quiet{color:var(--soft);font-weight:400}
.sign{margin-left:.4em}
figure{margin:0}
figcaption{color:var(--soft);font-size:14px}
.plot{margin:18px 0}
.plot svg{display:block;width:100%;height:auto;border:1px solid var(--line);border-radius:10px;box-shadow:var(--shadow)}
.plot figcaption{margin-top:7px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(228px,1fr));grid-auto-flow:row dense;gap:14px;margin:18px 0}
.pictures figure{display:flex;flex-direction:column;overflow:hidden;background:var(--surface);border-radius:10px}
.pictures figure{border:1px solid var(--line);box-shadow:var(--shadow)}
@media(min-width:560px){.pictures .broad{grid-column:span 2}}
.frame{display:flex;flex:1;align-items:center;justify-content:center;background:var(--stripe);border-bottom:1px solid var(--line)}
.pictures img{display:block;max-width:100%;height:auto;image-rendering:pixelated}
.pictures figcaption{padding:9px 12px 11px;color:var(--ink);line-height:1.4}
@media print{body{background:#fff}main{padding:0;max-width:none}nav{display:none}
.wide,.figures div,.plot svg,.pictures figure{box-shadow:none;break-inside:avoid}}
"""
