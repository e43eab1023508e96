'use strict';
// Draws what the page's data holds. Charts are SVG; each says in words what it shows.
const find = id => document.getElementById(id);
const {runs, differences} = JSON.parse(find('data').textContent);
const COLOURS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#d55e00', '#56b4e9', '#8f7f00', '#777777']; // Okabe and Ito
const DASHES = ['', '6 3', '2 3', '8 3 2 3'];
const SVG = 'http://www.w3.org/2000/svg', WIDTH = 320, HEIGHT = 180, LEFT = 52, BOTTOM = 22, TOP = 8;
const shown = runs.map(() => true);
let order = {key: null, sign: -1};

const element = (tag, text = '', attributes = {}, children = []) => {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};
const shape = (tag, attributes, text = '') => {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
};
const colour = index => COLOURS[index % COLOURS.length];
const dash = index => DASHES[Math.floor(index / COLOURS.length) % DASHES.length];
const short = value => value === null || value === undefined ? '-'
  : Number.isInteger(value) ? String(value)
  : Math.abs(value) < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4));
const duration = seconds => seconds === null ? '-'
  : seconds < 90 ? `${short(seconds)} s` : seconds < 5400 ? `${short(seconds / 60)} min` : `${short(seconds / 3600)} h`;
const figure = (title, note, svg) =>
  element('figure', '', {}, [element('figcaption', title, {}, note ? [element('small', note)] : []), svg]);

const scale = (low, high, from, to) => {
  const half = high / 2 - low / 2 || 0.5;  // the whole width may be beyond the largest number
  return value => from + (value / 2 - low / 2) / half * (to - from);
};
const range = values => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

const axes = (svg, [lowX, highX], [lowY, highY]) => {
  svg.append(shape('path', {class: 'axis', d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - 4}`}));
  for (const [text, x, y, anchor] of [
    [short(highY), LEFT - 4, TOP + 8, 'end'], [short(lowY), LEFT - 4, HEIGHT - BOTTOM, 'end'],
    [short(lowX), LEFT, HEIGHT - 6, 'start'], [short(highX), WIDTH - 4, HEIGHT - 6, 'end'],
  ]) svg.append(shape('text', {x, y, 'text-anchor': anchor}, text));
};
const canvas = label => shape('svg', {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': label});

const smooth = (points, by) => {
  let mean = null;
  return points.map(([step, value]) => [step, mean = mean === null ? value : by * mean + (1 - by) * value]);
};

const curve = key => {
  const by = +find('smoothing').value;
  const lines = runs.map((run, index) => [index, shown[index] && run.curves[key] ? smooth(run.curves[key], by) : []])
    .filter(([, points]) => points.length);
  if (!lines.length) return null;
  const all = lines.flatMap(([, points]) => points);
  const xs = range(all.map(point => point[0])), ys = range(all.map(point => point[1]));
  const last = lines.map(([index, points]) => `${runs[index].name} ends at ${short(points[points.length - 1][1])}`);
  const svg = canvas(`${key} from step ${short(xs[0])} to ${short(xs[1])}: ${last.join(', ')}`);
  axes(svg, xs, ys);
  const x = scale(...xs, LEFT, WIDTH - 4), y = scale(...ys, HEIGHT - BOTTOM, TOP);
  for (const [index, points] of lines) {
    const paint = {stroke: colour(index), 'stroke-dasharray': dash(index)};
    if (points.length > 1) svg.append(shape('polyline', {...paint, points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(' ')}));
    else svg.append(shape('circle', {cx: x(points[0][0]), cy: y(points[0][1]), r: 3.5, fill: colour(index)}));
  }
  return figure(key, '', svg);
};

const bars = (title, note, label, values, index, top) => {
  const svg = canvas(label), y = scale(0, top, HEIGHT - BOTTOM, TOP), width = (WIDTH - LEFT - 4) / values.length;
  axes(svg, values.ends, [0, top]);
  values.list.forEach((value, i) => svg.append(shape('rect', {
    x: LEFT + i * width + 1, width: Math.max(width - 2, 1), y: y(value), height: HEIGHT - BOTTOM - y(value), fill: colour(index),
  })));
  return figure(title, note, svg);
};

const layerRates = run => Object.entries(run.final)
  .map(([key, value]) => [key.match(/^activation_rate\/layer_(\d+)(.*)$/), value])
  .filter(([found]) => found).sort(([a], [b]) => a[1] - b[1] || a[2].localeCompare(b[2])).map(([, value]) => value);

const rates = (run, index) => {
  const list = layerRates(run);
  if (!shown[index] || !list.length) return null;
  const said = list.map(rate => rate.toFixed(2)).join(' ');
  return bars(run.name, said, `${run.name}, rate of each layer: ${said}`, {list, length: list.length, ends: [0, list.length - 1]}, index, 1);
};

const costs = (run, index) => {
  if (!shown[index] || !run.costs) return null;
  const {counts, marks, images} = run.costs;
  const said = Object.entries(marks).map(([name, value]) => `${name} ${short(value)}`).join(', ');
  return bars(run.name, `${images} images: ${said}`, `${run.name}, cost of ${images} images: ${said}`,
    {list: counts, length: counts.length, ends: [marks.min, marks.max]}, index, Math.max(...counts));
};

const columns = () => {
  const keys = [...new Set(runs.flatMap(run => Object.keys(run.final)))];
  return ['time', ...keys.filter(key => !/layer_|(^|\/)(data_)?time$/.test(key))];
};
const cell = (run, key) => key === 'time' ? run.seconds : run.final[key] ?? null;

const table = () => {
  const rows = runs.map((run, index) => [run, index]).filter(([, index]) => shown[index]);
  if (order.key) rows.sort(([a], [b]) => {
    const [x, y] = [cell(a, order.key), cell(b, order.key)];
    return x === null ? 1 : y === null ? -1 : order.sign * (x - y);
  });
  const heads = columns().map(key => {
    const button = element('button', key === 'time' ? 'training' : key, {type: 'button'});
    button.addEventListener('click', () => {
      order = {key, sign: order.key === key ? -order.sign : -1};
      table();
      [...find('table').querySelectorAll('button')].find(other => other.textContent === button.textContent).focus();
    });
    const sort = order.key !== key ? 'none' : order.sign < 0 ? 'descending' : 'ascending';
    return element('th', '', {scope: 'col', 'aria-sort': sort}, [button]);
  });
  const body = rows.map(([run]) => element('tr', '', {}, [element('th', run.name, {scope: 'row'}),
    ...columns().map(key => element('td', key === 'time' ? duration(run.seconds) : short(cell(run, key))))]));
  find('table').replaceChildren(element('tr', '', {}, [element('th', 'run', {scope: 'col'}), ...heads]), ...body);
};

const differing = () => {
  const kept = runs.map((run, index) => index).filter(index => shown[index]);
  const rows = differences.map(([key, values]) => element('tr', '', {}, [element('th', key, {scope: 'row'}),
    ...kept.map(index => element('td', values[index] ?? '-'))]));
  const head = element('tr', '', {}, [element('th', 'key', {scope: 'col'}), ...kept.map(index => element('th', runs[index].name, {scope: 'col'}))]);
  find('differences').replaceChildren(...rows.length ? [head, ...rows] : [element('caption', 'None.')]);
};

const put = (id, made) => {
  const kept = made.filter(Boolean);
  find(id).replaceChildren(...kept);
  find(id).closest('section').hidden = !kept.length;
};
const keys = [...new Set(runs.flatMap(run => Object.keys(run.curves)))].sort()
  .filter(key => runs.some(run => (run.curves[key] ?? []).length > 1));  // one value is in the table
const curves = () => {
  const rare = key => /layer_|time$|memory$|gmacs/.test(key);
  put('curves', keys.filter(key => !rare(key)).map(curve));
  const more = keys.filter(rare).map(curve).filter(Boolean);
  find('more').replaceChildren(...more);
  find('more').parentElement.hidden = !more.length;
};
const draw = () => {
  curves();
  put('rates', runs.map(rates));
  put('costs', runs.map(costs));
  put('pictures', runs.flatMap((run, index) => shown[index] ? run.pictures.map(([name, src]) =>
    element('figure', '', {}, [element('img', '', {src, alt: `${name}, written by ${run.name}`}), element('figcaption', `${run.name}: ${name}`)])) : []));
  table();
  differing();
};

runs.forEach((run, index) => {
  const box = element('input', '', {type: 'checkbox', id: `run-${index}`});
  box.checked = true;
  box.addEventListener('change', () => { shown[index] = box.checked; draw(); });
  find('runs').append(element('label', '', {for: `run-${index}`}, [box, element('i', '', {class: 'run'}), run.name]));
  find('runs').lastChild.querySelector('i').style.background = colour(index);
});
find('smoothing').addEventListener('input', () => { find('smoothing').nextElementSibling.textContent = find('smoothing').value; curves(); });
const broken = runs.filter(run => run.broken).map(run => `${run.name}: ${run.broken}`);
find('broken').textContent = broken.length ? `Lines of logs that could not be read, and are left out: ${broken.join(', ')}.` : '';
draw();
