/* Stands in for libnvinfer, libnvinfer_plugin and libnvonnxparser, so that NVIDIA's Python bindings can be imported without them.
 * Everything answers "there is none": classes, enumerations and virtual functions are NVIDIA's, nothing can be built. */
#define NONE(name) void *name(void) { return 0; }
NONE(createInferBuilder_INTERNAL)
NONE(createInferRuntime_INTERNAL)
NONE(createInferRefitter_INTERNAL)
NONE(createNvOnnxParser_INTERNAL)
NONE(createNvOnnxParserRefitter_INTERNAL)
NONE(getBuilderPluginRegistry)
NONE(getPluginRegistry)
NONE(initLibNvInferPlugins)
NONE(getNvOnnxParserVersion)
