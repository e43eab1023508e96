const find = id => document.getElementById(id);
const data = JSON.parse(find('data').textContent);
for (const image of data.images) for (const key of ['gmacs', 'dense', 'rest']) image[key] ??= NaN; // what is not known
const colours = bytes(data.colours); // 256 x red, green, blue
const state = {image: 0, layer: 0, frame: 0, opacity: 0.55, rate: null, show: 'tokens'}; // rate: null is as it ran
const pictures = new Map();
let order = -1;

// ---- what ran

// What the state shows of an image: its maps and numbers, as they ran or as they would at another rate.
function now(image) {
  unpack(image);
  if (state.rate === null || !image.ranking) return {ran: image.ran, rates: image.rates, gmacs: image.gmacs, moved: false};
  const ran = decide(image, state.rate), rates = ratesOf(ran, image.layers.length);
  return {ran, rates, gmacs: estimate(image, rates), moved: true};
}

// The map of a frame: of one layer, or the mean of all.
function mapOf(image, ran) {
  const layers = image.layers.length;
  const maps = image.layers.map((_, layer) => slice(slice(ran, layer, layers), state.frame, image.frames.length));
  return state.layer ? maps[state.layer - 1] : maps[0].map((_, cell) => mean(maps.map(map => map[cell])));
}

// ---- drawing

function loaded(uri) {
  if (!pictures.has(uri)) {
    const picture = new Image();
    picture.onload = draw;
    picture.src = uri;
    pictures.set(uri, picture);
  }
  const picture = pictures.get(uri);
  return picture.complete && picture.naturalWidth ? picture : null;
}

function heat(map, [height, width]) {
  const canvas = Object.assign(document.createElement('canvas'), {width, height});
  const cells = new ImageData(width, height);
  map.forEach((share, i) => {
    const colour = 3 * Math.round(255 * (isNaN(share) ? 0 : share));
    cells.data.set([...colours.subarray(colour, colour + 3), isNaN(share) ? 0 : 255], 4 * i);
  });
  canvas.getContext('2d').putImageData(cells, 0, 0);
  return canvas;
}

function draw() {
  const image = data.images[state.image], canvas = find('picture'), picture = loaded(image.frames[state.frame]);
  if (!picture) return;
  const {naturalWidth: width, naturalHeight: height} = picture;
  const scale = Math.max(1, Math.floor(640 / Math.max(width, height))); // small pictures have fewer pixels than maps need
  Object.assign(canvas, {width: scale * width, height: scale * height});
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const labels = image.labels[state.show];
  const over = state.show === 'tokens' ? heat(mapOf(image, now(image).ran), image.cells) : labels && loaded(labels);
  if (!over) return;
  if (state.show === 'tokens') { // over grey, so that all colour is the map's
    context.globalCompositeOperation = 'saturation';
    context.fillStyle = 'grey';
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = 'source-over';
  }
  context.globalAlpha = state.opacity;
  const [down, along] = state.show === 'tokens' ? image.extent : [1, 1]; // the last cells may reach beyond the picture
  context.drawImage(over, 0, 0, along * canvas.width, down * canvas.height);
}

// ---- numbers

const number = (value, digits) => value === null || isNaN(value) ? 'not known' : value.toFixed(digits);
const percent = value => isNaN(value) ? 'not known' : `${(100 * value).toFixed(1)} %`;

function element(name, parts, attributes = {}) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...[].concat(parts));
  return made;
}

function bar(share) {
  const filled = element('div', []);
  filled.style.width = `${100 * (share || 0)}%`;
  return element('div', filled, {className: 'bar'});
}

function table(id, rows) {
  const made = rows.map(([name, ...cells]) => element('tr', [
    element('th', name, {scope: 'row'}), ...cells.map(cell => element('td', cell))]));
  find(id).tBodies[0].replaceChildren(...made);
}

function showNumbers(image) {
  const {rates, gmacs, moved} = now(image), word = moved ? ' (estimate)' : '', rate = mean(rates);
  find('estimate').textContent = moved ? 'estimate' : '';
  const share = percent(gmacs / image.dense);
  const ran = [['GMACs, as it ran', number(image.gmacs, 3)], ['activation rate, as it ran', number(mean(image.rates), 3)]];
  table('numbers', [
    ['GMACs', number(gmacs, 3)], ['GMACs, dense', number(image.dense, 3)], ['share of dense', share],
    ['activation rate', number(rate, 3)], ...(moved ? ran : [])]);
  table('layers', image.layers.map((name, layer) => [name, bar(rates[layer]), number(rates[layer], 2)]));
  find('summary').textContent = `Rate ${number(rate, 3)}, ${number(gmacs, 3)} GMACs, ${share} of dense${word}.`;
}

function showSlider(id, value, text, most) {
  const input = find(id);
  if (most !== undefined) input.max = most;
  input.value = value;
  input.setAttribute('aria-valuetext', text);
  input.nextElementSibling.textContent = text;
}

function showControls(image) {
  const asked = state.rate !== null && image.ranking;
  const frames = image.frames.length, asRun = mean(image.rates);
  showSlider('layer', state.layer, state.layer ? image.layers[state.layer - 1] : 'mean of all', image.layers.length);
  showSlider('opacity', state.opacity, percent(state.opacity));
  showSlider('frame', state.frame, `${state.frame + 1} of ${frames}`, frames - 1);
  showSlider('rate', asked ? state.rate : asRun, asked ? `${state.rate.toFixed(2)}, estimate` : 'as it ran');
  find('frame').parentElement.hidden = frames < 2;
  find('rate').disabled = !image.ranking;
  find('as-run').disabled = !asked;
  find('why').textContent = image.ranking
    ? 'One threshold over the logits of all layers of this image. The prediction is not computed again.'
    : 'Cannot be asked: no logits of the gates were stored for this image.';
  document.querySelector('fieldset').hidden = !Object.keys(image.labels).length;
  for (const radio of document.querySelectorAll('[name=show]')) {
    radio.checked = radio.value === state.show;
    radio.disabled = ['truth', 'prediction'].includes(radio.value) && !image.labels[radio.value];
  }
}

function showImage(image) {
  find('name').textContent = image.name;
  find('answers').textContent = Object.entries(image.answers).map(([name, word]) => `${name}: ${word}`).join(', ');
  find('picture').setAttribute('aria-label', `${image.name}; over it: ${state.show}`);
  const labels = ['truth', 'prediction'].includes(state.show);
  find('legend').hidden = state.show !== 'tokens';
  find('classes').replaceChildren(...(labels ? image.classes : []).map(([name, colour]) => {
    const square = element('i', []);
    square.style.background = colour;
    return element('li', [square, name]);
  }));
}

// ---- the list and the distribution

const compare = (a, b) => isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : order * (a - b); // what is not known comes last
const ordered = () => [...data.images.keys()].sort((a, b) => compare(data.images[a].gmacs, data.images[b].gmacs))
  .filter(i => data.images[i].name.toLowerCase().includes(find('filter').value.toLowerCase()));

function showList() {
  const shown = ordered();
  find('images').replaceChildren(...shown.map(i => {
    const {name, gmacs} = data.images[i];
    return element('li', [element('span', name.split('/').pop()), element('span', number(gmacs, 3))], {
      id: `image-${i}`, role: 'option', title: name, onclick: () => choose(i)});
  }));
  find('shown').textContent = `${shown.length} of ${data.images.length} images, with GMACs`;
  mark();
}

// Scrolls the list and, unlike scrollIntoView, never the page.
function reveal(item) {
  const list = item.parentElement, least = item.offsetTop + item.offsetHeight - list.clientHeight;
  list.scrollTop = Math.max(least, Math.min(list.scrollTop, item.offsetTop));
}

function mark() {
  for (const item of find('images').children) item.ariaSelected = item.id === `image-${state.image}`;
  const own = find(`image-${state.image}`);
  find('images').setAttribute('aria-activedescendant', own ? own.id : '');
  if (own) reveal(own);
  for (const bar of find('bars').children) bar.classList.toggle('own', bar.own?.includes(state.image));
}

function showDistribution() {
  const places = [...data.images.keys()].filter(i => !isNaN(data.images[i].gmacs));
  const costs = places.map(i => data.images[i].gmacs), dense = mean(data.images.map(image => image.dense)), bins = 30;
  const low = Math.min(...costs, dense), width = (Math.max(...costs, dense) - low || 1) / bins;
  const filled = Array.from({length: bins}, () => []);
  costs.forEach((cost, i) => filled[Math.min(bins - 1, Math.floor((cost - low) / width))].push(places[i]));
  const most = Math.max(1, ...filled.map(own => own.length));
  const bars = filled.map(own => Object.assign(element('div', []), {own, title: `${own.length} images`}));
  bars.forEach(bar => { bar.style.height = `${100 * bar.own.length / most}%`; });
  const line = element('i', [], {title: 'dense'});
  line.style.left = `calc(${100 * (dense - low) / width / bins}% - 2px)`;
  find('bars').replaceChildren(...bars, line);
  const text = `GMACs of ${costs.length} images: ${number(Math.min(...costs), 3)} to ${number(Math.max(...costs), 3)}, `
    + `mean ${number(mean(costs), 3)}; dashed: dense, ${number(dense, 3)}.`;
  find('costs').textContent = text;
  find('bars').ariaLabel = text;
}

// ---- the state: in the address, so that it can be kept and passed on

function show() {
  const image = data.images[state.image];
  unpack(image);
  state.layer = Math.min(state.layer, image.layers.length);
  state.frame = Math.min(state.frame, image.frames.length - 1);
  if (state.show in {prediction: 0, truth: 0} && !image.labels[state.show]) state.show = 'tokens';
  showImage(image);
  showControls(image);
  showNumbers(image);
  mark();
  draw();
}

function change(changes) {
  Object.assign(state, changes);
  show();
  const parts = Object.entries(state).filter(([, value]) => value !== null);
  history.replaceState(null, '', '#' + new URLSearchParams(parts));
}

function choose(image) {
  pictures.clear();
  change({image});
}

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)), limits = {
    image: data.images.length - 1, layer: Infinity, frame: Infinity, opacity: 1, rate: 1};
  for (const [name, most] of Object.entries(limits)) {
    const value = Number(asked.get(name) || NaN);
    if (!(value >= 0)) continue;
    state[name] = Math.min(['rate', 'opacity'].includes(name) ? value : Math.floor(value), most);
  }
  if (['tokens', 'prediction', 'truth', 'nothing'].includes(asked.get('show'))) state.show = asked.get('show');
}

function move(event) {
  const shown = ordered(), at = shown.indexOf(state.image);
  const to = {ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1, Home: 0, End: shown.length - 1}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  if (shown.length) choose(shown[Math.max(0, Math.min(to, shown.length - 1))]);
}

function start() {
  document.title = find('title').textContent = data.title;
  find('main').hidden = find('distribution').hidden = !data.images.length;
  showList();
  if (!data.images.length) return;
  const stops = Array.from({length: 9}, (_, i) => `rgb(${colours.subarray(3 * Math.min(32 * i, 255), 3 * Math.min(32 * i, 255) + 3)})`);
  find('colours').style.background = `linear-gradient(90deg, ${stops})`;
  find('filter').oninput = showList;
  find('order').onchange = event => { order = Number(event.target.value); showList(); };
  find('images').onkeydown = move;
  find('as-run').onclick = () => { find('rate').focus(); change({rate: null}); };
  for (const id of ['layer', 'frame', 'opacity', 'rate']) find(id).oninput = event => change({[id]: Number(event.target.value)});
  for (const radio of document.querySelectorAll('[name=show]')) radio.onchange = () => change({show: radio.value});
  onhashchange = () => { readAddress(); show(); };
  state.image = ordered()[0];
  readAddress();
  showDistribution();
  show();
}

start();
