// The Python side of the native library (nanobind). What a file says has been checked in Python before it comes here;
// sizes that kernels rely on are checked again where arrays meet them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <stdexcept>

#include "bench.h"
#include "codes.h"
#include "dispatch.h"
#include "processor.h"
#include "segmenter.h"
#include "vit.h"

namespace nb = nanobind;
using namespace sparsemae;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

template <class T>
T field(const nb::object& shape, const char* name) {
  return nb::cast<T>(shape.attr(name));
}

VitConfig read_config(const nb::object& shape) {
  const auto size = [&](const char* name) { return field<std::size_t>(shape, name); };
  const auto flag = [&](const char* name) { return field<bool>(shape, name); };
  const auto pool = field<std::string>(shape, "global_pool");
  VitConfig c{};
  c.embed_dim = size("embed_dim"), c.depth = size("depth"), c.num_heads = size("num_heads"),
  c.mlp_hidden = size("mlp_hidden");
  c.patch_size = size("patch_size"), c.image_height = size("image_height"), c.image_width = size("image_width");
  c.in_chans = size("in_chans"), c.num_classes = size("num_classes"), c.reg_tokens = size("reg_tokens");
  c.class_token = flag("class_token"), c.no_embed_class = flag("no_embed_class"), c.pre_norm = flag("pre_norm");
  c.final_norm = flag("final_norm"), c.fc_norm = flag("fc_norm");
  c.patch_bias = flag("patch_bias");
  c.pool_include_prefix = flag("pool_include_prefix"), c.average_pool = pool == "avg", c.all_tokens = pool.empty();
  c.norm_eps = field<float>(shape, "norm_eps");
  return c;
}

// A segmenter's head: sparsemae.packing.segmenter.DenseHead.
DenseHead read_head(const nb::object& head) {
  DenseHead h;
  h.fused = field<std::string>(head, "kind") == "segformer";
  h.width = field<std::size_t>(head, "width"), h.classes = field<std::size_t>(head, "num_classes");
  for (const nb::handle& tap : head.attr("out_indices")) h.taps.push_back(nb::cast<std::size_t>(tap));
  return h;
}

// Collects the tensors of one model; build() lays them out and lets them go.
class Builder {
 public:
  Builder(nb::object shape, nb::object head) : shape_(std::move(shape)), head_(std::move(head)) {}

  void vector(const std::string& name, const Array<float>& values) {
    vectors_[name] = std::vector<float>(values.data(), values.data() + values.size());
  }

  void dense(const std::string& name, const Array<float>& values) {
    if (values.ndim() < 2) throw std::invalid_argument(name + " must have two dimensions");
    Weights w;
    w.rows = values.shape(0);
    w.columns = values.size() / std::max<std::size_t>(1, w.rows);
    w.fp32 = values.data();
    keep(name, w, values);
  }

  void sparse(const std::string& name, std::size_t columns, unsigned n, unsigned m, const Array<std::uint8_t>& codes,
              const nb::object& values, const nb::object& scale, bool quantize) {
    Weights w;
    w.columns = columns, w.n = n, w.m = m;
    w.codes = codes.data(), w.code_bytes = codes.size();
    if (!n || !m || columns % m) throw std::invalid_argument(name + ": rows must be a multiple of m");
    std::size_t count = 0;
    Array<float> fp32;
    Array<std::uint16_t> bf16;
    Array<std::int8_t> int8;
    if (nb::try_cast(values, fp32, false)) {
      w.fp32 = fp32.data(), count = fp32.size();
    } else if (nb::try_cast(values, bf16, false)) {
      w.bf16 = bf16.data(), count = bf16.size();
    } else if (nb::try_cast(values, int8, false)) {
      w.int8 = int8.data(), count = int8.size();
    } else {
      throw std::invalid_argument(name + ": values must be float32, uint16 or int8");
    }
    const std::size_t per_row = columns / m * n;
    w.rows = count / per_row;
    if (w.rows * per_row != count) throw std::invalid_argument(name + ": wrong number of values");
    if (w.int8) {
      const auto scales = nb::cast<Array<float>>(scale);
      if (scales.size() != w.rows) throw std::invalid_argument(name + ": wrong number of scales");
      w.row_scale = scales.data();
      w.quantize = quantize;
    }
    keep(name, w, codes);
    alive_.push_back(values);
    alive_.push_back(scale);
  }

  Vit* build(std::size_t threads, const std::string& isa) {
    if (threads < 1 || threads > 1024)
      throw std::invalid_argument("threads must be in [1, 1024], got " + std::to_string(threads));
    VitConfig config = read_config(shape_);
    if (!head_.is_none()) config.head = read_head(head_);
    const nb::gil_scoped_release release;
    return new Vit(config, weights_, vectors_, threads, isa);
  }

 private:
  template <class T>
  void keep(const std::string& name, const Weights& w, const T& array) {
    weights_[name] = w;
    alive_.push_back(nb::cast(array));
  }

  nb::object shape_, head_;
  std::map<std::string, Weights> weights_;
  std::map<std::string, std::vector<float>> vectors_;
  std::vector<nb::object> alive_;
};

// A float array [shape] and its memory, which Python owns.
std::pair<nb::object, float*> new_floats(const std::vector<std::size_t>& shape) {
  std::size_t size = 1;
  for (const std::size_t side : shape) size *= side;
  auto* out = new float[size];
  const nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return {nb::cast(nb::ndarray<nb::numpy, float>(out, shape.size(), shape.data(), owner)), out};
}

nb::object forward(Vit& model, const Array<float>& images, bool features) {
  const VitConfig& c = model.config();
  if (images.ndim() != 4 || images.shape(1) != c.in_chans || images.shape(2) != c.image_height ||
      images.shape(3) != c.image_width)
    throw std::invalid_argument("images must be float32 [B, " + std::to_string(c.in_chans) + ", " +
                                std::to_string(c.image_height) + ", " + std::to_string(c.image_width) + "]");
  const std::size_t batch = images.shape(0);
  features = features || c.all_tokens;
  std::vector<std::size_t> shape{batch};
  if (features)
    shape.insert(shape.end(), {model.tokens(), c.embed_dim});
  else
    shape.push_back(model.outputs());
  const auto [array, out] = new_floats(shape);
  {
    const nb::gil_scoped_release release;
    model.forward(images.data(), batch, out, features);
  }
  return array;
}

// images [batch][channels][height][width], sides that are multiples of the patch.
nb::object scores(Segmenter& segmenter, const Array<float>& images) {
  const VitConfig& c = segmenter.model().config();
  if (images.ndim() != 4 || images.shape(1) != c.in_chans || images.shape(2) % c.patch_size ||
      images.shape(3) % c.patch_size || !images.size())
    throw std::invalid_argument("images must be float32 [B, " + std::to_string(c.in_chans) +
                                ", H, W] of whole patches");
  const std::size_t batch = images.shape(0), height = images.shape(2), width = images.shape(3);
  const auto [array, out] = new_floats({batch, height / c.patch_size, width / c.patch_size, c.head->classes});
  {
    const nb::gil_scoped_release release;
    segmenter.scores(images.data(), batch, height, width, out);
  }
  return array;
}

nb::object classes(Segmenter& segmenter, const Array<std::uint8_t>& pixels) {
  if (pixels.ndim() != 3 || pixels.shape(2) != 3 || !pixels.size())
    throw std::invalid_argument("pixels must be uint8 [H, W, 3]");
  const std::size_t shape[] = {pixels.shape(0), pixels.shape(1)};
  auto* out = new std::uint8_t[shape[0] * shape[1]];
  const nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<std::uint8_t*>(p); });
  {
    const nb::gil_scoped_release release;
    segmenter.classes(pixels.data(), shape[1], shape[0], 3, out);
  }
  return nb::cast(nb::ndarray<nb::numpy, std::uint8_t>(out, 2, shape, owner));
}

}  // namespace

NB_MODULE(_native, m) {
  nb::class_<Builder>(m, "Builder")
      .def(nb::init<nb::object, nb::object>(), nb::arg("shape"), nb::arg("head").none() = nb::none())
      .def("vector", &Builder::vector)
      .def("dense", &Builder::dense)
      .def("sparse", &Builder::sparse, nb::arg("name"), nb::arg("columns"), nb::arg("n"), nb::arg("m"),
           nb::arg("codes"), nb::arg("values"), nb::arg("scale").none(), nb::arg("quantize"))
      .def("build", &Builder::build, nb::arg("threads"), nb::arg("isa"), nb::rv_policy::take_ownership);
  nb::class_<Vit>(m, "Vit")
      .def("__call__", &forward, nb::arg("images"), nb::arg("features"))
      .def_prop_ro("isa", [](const Vit& v) { return v.kernels().name; })
      .def_prop_ro("math", [](const Vit& v) { return v.kernels().math; })
      .def_prop_ro("threads", &Vit::threads);
  nb::class_<Segmenter>(m, "Segmenter")
      .def(
          "__init__",
          [](Segmenter* at, Vit& model, const std::vector<float>& mean, const std::vector<float>& std,
             double short_side, double long_side, bool slide, std::size_t stride, const std::vector<double>& scales,
             bool flip) {
            new (at) Segmenter(model, {mean, std, "", 1.0, {}}, {short_side, long_side, slide, flip, stride, scales});
          },
          nb::arg("model"), nb::arg("mean"), nb::arg("std"), nb::arg("short_side"), nb::arg("long_side"),
          nb::arg("slide"), nb::arg("stride"), nb::arg("scales"), nb::arg("flip"), nb::keep_alive<1, 2>())
      .def("scores", &scores, nb::arg("images"))
      .def("classes", &classes, nb::arg("pixels"));
  m.def("usable_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* table : usable_kernels()) names.emplace_back(table->name);
    return names;
  });
  nb::class_<KernelTiming>(m, "KernelTiming")
      .def_ro("kernel", &KernelTiming::kernel)
      .def_ro("seconds", &KernelTiming::seconds)
      .def_ro("instructions", &KernelTiming::instructions)
      .def_ro("peak", &KernelTiming::peak)
      .def_ro("zeros", &KernelTiming::zeros);
  m.def("time_kernels", &time_kernels, nb::arg("model"), nb::arg("rounds"), nb::call_guard<nb::gil_scoped_release>());
  m.def("processor", [] { return std::make_pair(this_processor().name(), this_processor().features()); });
  m.def("decode_positions", [](const Array<std::uint8_t>& codes, std::size_t groups, unsigned n, unsigned k) {
    const auto positions = decode_positions(codes.data(), codes.size(), groups, n, k);
    return nb::bytes(reinterpret_cast<const char*>(positions.data()), positions.size());
  });
}
