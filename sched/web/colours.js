// Colours that canvases need. Groups get hues far apart (golden angle) at one lightness, so each can be read on the paper.

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

export const named = (name) => {
  const probe = document.createElement("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
};

export function groupColour(id) {
  if (id === null || id === undefined) return isDark() ? "#8a929b" : "#7a828b";
  return `oklch(${isDark() ? 0.76 : 0.56} 0.15 ${(25 + id * 137.508) % 360})`;
}

const NEAR_TO_FAR = [
  [222, 243, 230],
  [126, 203, 184],
  [52, 143, 173],
  [58, 84, 156],
  [47, 27, 84],
];
export const UNREACHABLE = [205, 62, 75];
const UNKNOWN = { light: [226, 226, 222], dark: [58, 63, 70] };

export const unknown = () => (isDark() ? UNKNOWN.dark : UNKNOWN.light);

/** Return 65,536 packed colours, by RTT in 0.1 ms, on a logarithmic scale between two RTTs. */
export function ramp(low, high) {
  const packed = new Uint32Array(65536);
  const span = Math.log(high / low) || 1;
  for (let tenth = 0; tenth < 65536; tenth++) {
    const share = Math.min(1, Math.max(0, Math.log(Math.max(tenth, 1) / low) / span)) * (NEAR_TO_FAR.length - 1);
    const step = Math.min(NEAR_TO_FAR.length - 2, Math.floor(share));
    packed[tenth] = pack(NEAR_TO_FAR[step].map((from, i) => from + (NEAR_TO_FAR[step + 1][i] - from) * (share - step)));
  }
  return packed;
}

export const pack = ([red, green, blue]) => (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0;

export const css = (packed) => `rgb(${packed & 255} ${(packed >> 8) & 255} ${(packed >> 16) & 255})`;
