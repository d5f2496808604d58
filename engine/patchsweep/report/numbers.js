// The text of a number, as `data.show.number` writes it; a dash for null, NaN and infinity.
const number = (x) => {
  if (x === null || !Number.isFinite(x)) return "\u2013";
  const size = Math.abs(x);
  if (size > 0 && size < 5e-4) return x.toExponential(1).replace(/-/g, "\u2212");
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : 3;
  const [whole, decimals] = size.toFixed(digits).split(".");
  const text = whole.replace(/\B(?=(\d{3})+$)/g, "\u202f") + (decimals ? "." + decimals : "");
  return (x < 0 ? "\u2212" : "") + text;
};
