"""The page's style and script, embedded into every report."""

STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--quiet:#60646c;--paper:#fbfbfa;--card:#fff;--line:#e2e3e5;--accent:#0b6e99}
@media (prefers-color-scheme:dark){:root{--ink:#edeef0;--quiet:#a2a7b0;--paper:#15171a;--card:#1d2024;--line:#33373d;
--accent:#5fb7dd}}
*{box-sizing:border-box}
body{margin:0;padding:clamp(.75rem,3vw,2.5rem);background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1180px;margin:0 auto}
h1{font-size:clamp(1.3rem,3.5vw,1.9rem);line-height:1.2;margin:0 0 1rem;letter-spacing:-.01em}
h2{font-size:1.1rem;margin:0 0 .75rem;overflow-wrap:anywhere}
small{color:var(--quiet);font-weight:400;margin-left:.35rem}
.facts{display:grid;gap:.3rem;margin:0 0 1.5rem;font-size:.9rem}
.facts div{display:grid;grid-template-columns:6.5rem 1fr;gap:.75rem}
.facts dt{color:var(--quiet)}.facts dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin-bottom:1.5rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem;background:var(--card)}
caption{text-align:left;color:var(--quiet);font-size:.85rem;padding-bottom:.35rem}
th,td{padding:.4rem .8rem;border:1px solid var(--line);text-align:right;white-space:nowrap}
th{font-weight:600}tbody th{text-align:left}
.case{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:clamp(.75rem,2.5vw,1.5rem);
margin:0 0 1.5rem}
.compare{max-width:min(max(var(--width),840px),calc(85vh*var(--aspect)));margin:0 auto}
.stage{position:relative;width:100%;aspect-ratio:var(--aspect);overflow:hidden;border-radius:6px;background:#000;--at:50%}
.stage img{position:absolute;inset:0;width:100%;height:100%;object-fit:contain}
.stage .left{clip-path:inset(0 calc(100% - var(--at)) 0 0)}
.divider{position:absolute;top:0;bottom:0;left:var(--at);width:2px;margin-left:-1px;background:#fff;
box-shadow:0 0 4px #0009;pointer-events:none}
.divider::after{content:"\\2194";position:absolute;top:50%;left:50%;width:2.2rem;height:2.2rem;
transform:translate(-50%,-50%);border-radius:50%;background:#fff;color:#222;text-align:center;
font:1.3rem/2.2rem system-ui,sans-serif;box-shadow:0 1px 5px #0008}
.stage input{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;cursor:ew-resize;touch-action:pan-y}
.stage:focus-within{outline:3px solid var(--accent);outline-offset:2px}
.frame{position:absolute;display:flex;align-items:flex-end;border:1.5px solid #fffd;
box-shadow:0 0 3px #000c,inset 0 0 3px #000c;border-radius:3px;
padding-left:.3rem;color:#fff;font-size:.8rem;font-weight:600;line-height:1.4;text-shadow:0 0 3px #000,0 0 2px #000;
pointer-events:none}
.tag{position:absolute;top:.6rem;padding:.1rem .55rem;border-radius:99px;background:#000a;color:#fff;font-size:.8rem;
pointer-events:none}
.tag-left{left:.6rem}.tag-right{right:.6rem}
.choices{display:flex;justify-content:space-between;flex-wrap:wrap;gap:.5rem;margin:.6rem 0 1.1rem;font-size:.85rem;
color:var(--quiet)}
select{font:inherit;color:var(--ink);background:var(--paper);border:1px solid var(--line);border-radius:6px;
padding:.25rem .4rem;min-height:2.2rem}
figure{margin:0}
figure img{display:block;width:100%;height:auto;border-radius:4px}
figcaption{font-size:.85rem;font-weight:600;margin-top:.35rem}
.versions{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,10.5rem),1fr));gap:.9rem}
.versions dl{margin:.15rem 0 0;font-size:.8rem;font-variant-numeric:tabular-nums}
.versions dl div{display:flex;justify-content:space-between;gap:.5rem;max-width:11rem}
.versions dt{color:var(--quiet)}.versions dd{margin:0}
.zooms{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:0 1.5rem}
.where{margin:1.2rem 0 .4rem;font-size:.82rem;color:var(--quiet)}
.where b{display:inline-block;min-width:1.3rem;margin-right:.35rem;border:1px solid var(--line);border-radius:4px;
text-align:center;color:var(--ink)}
.crops{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(30%,8rem),1fr));gap:.6rem}
.crop{image-rendering:pixelated;aspect-ratio:1}
@media print{.stage input,.choices{display:none}.case{break-inside:avoid}}
"""

# Without the script there is no slider, but every version and every crop.
SCRIPT = """
document.querySelectorAll('.case').forEach(function (section) {
  var stage = section.querySelector('.stage');
  var range = stage.querySelector('input');
  var pictures = section.querySelectorAll('.versions img');
  function move() {
    stage.style.setProperty('--at', range.value + '%');
    range.setAttribute('aria-valuetext', Math.round(range.value) + '% ' + stage.querySelector('.left').alt);
  }
  range.addEventListener('input', move);
  section.querySelectorAll('select').forEach(function (select) {
    function choose() {
      var side = select.dataset.side, chosen = pictures[select.value];
      var shown = stage.querySelector('.' + side);
      shown.src = chosen.src;
      shown.alt = chosen.alt;
      stage.querySelector('.tag-' + side).textContent = chosen.alt;
      move();
    }
    select.addEventListener('change', choose);
    choose();
  });
  section.querySelector('.compare').hidden = false;
});
"""
