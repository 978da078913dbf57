# The native tests: every kernel of every level in guarded memory, without Python. See tests/kernels/test_native.py.
file(GLOB _native_tests CONFIGURE_DEPENDS tests/native/*.cpp)
list(REMOVE_ITEM _native_tests "${CMAKE_CURRENT_SOURCE_DIR}/tests/native/vectors_level.cpp")
# the scalars are no place for speed (and gcc 12 for Arm does not survive vectorizing them)
set_source_files_properties(${_native_tests} PROPERTIES COMPILE_OPTIONS -O1)
add_executable(bitgrain_native_tests ${BITGRAIN_SOURCES} ${_native_tests})
bitgrain_configure(bitgrain_native_tests)

foreach(isa portable ${BITGRAIN_ISAS})  # the vector names, compiled as the kernels of that level are
  string(TOUPPER ${isa} upper)
  add_library(vectors_${isa} OBJECT tests/native/vectors_level.cpp)
  bitgrain_configure(vectors_${isa})
  target_compile_options(vectors_${isa} PRIVATE ${BITGRAIN_ISA_${isa}})
  target_compile_definitions(vectors_${isa} PRIVATE BG_ISA=${isa} BITGRAIN_LEVEL_${upper}=1)
  target_sources(bitgrain_native_tests PRIVATE $<TARGET_OBJECTS:vectors_${isa}>)
endforeach()
