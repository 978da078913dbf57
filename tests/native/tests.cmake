# The native tests: every kernel of every level in guarded memory, without Python. See tests/kernels/test_native.py.
add_executable(bitgrain_native_tests ${BITGRAIN_SOURCES} tests/native/main.cpp tests/native/int_linear.cpp
               tests/native/float8.cpp tests/native/vectors.cpp tests/native/pool.cpp)
bitgrain_configure(bitgrain_native_tests)

foreach(isa portable ${BITGRAIN_ISAS})  # the vector names, compiled as the kernels of that level are
  string(TOUPPER ${isa} upper)
  add_library(vectors_${isa} OBJECT tests/native/vectors_level.cpp)
  bitgrain_configure(vectors_${isa})
  target_compile_options(vectors_${isa} PRIVATE ${BITGRAIN_ISA_${isa}})
  target_compile_definitions(vectors_${isa} PRIVATE BG_ISA=${isa} BITGRAIN_LEVEL_${upper}=1)
  target_sources(bitgrain_native_tests PRIVATE $<TARGET_OBJECTS:vectors_${isa}>)
endforeach()
