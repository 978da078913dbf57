# Sources and flags of the kernels, shared by the Python module and by the native tests.
set(_native_dir "${CMAKE_CURRENT_LIST_DIR}")
file(GLOB BITGRAIN_BINDINGS CONFIGURE_DEPENDS "${_native_dir}/bind/*.cpp")
file(GLOB BITGRAIN_SOURCES CONFIGURE_DEPENDS "${_native_dir}/*.cpp" "${_native_dir}/attention/*.cpp"
     "${_native_dir}/decoder/*.cpp" "${_native_dir}/linear/*.cpp" "${_native_dir}/solver/*.cpp"
     "${_native_dir}/isa/portable.cpp")

# One translation unit for each instruction set, each with its own flags; which one runs is decided by cpuid at run
# time. Nothing else gets a machine flag: a wheel must start anywhere.
set(_avx2 -mavx2 -mfma -mf16c)
# gcc 12's own headers look uninitialized to it
set(_avx512 ${_avx2} -Wno-uninitialized $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized> -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(BITGRAIN_ISA_avx2 ${_avx2})
  set(BITGRAIN_ISA_avxvnni ${_avx2} -mavxvnni)
  set(BITGRAIN_ISA_avx512vnni ${_avx512})
  set(BITGRAIN_ISA_avx512bf16 ${_avx512} -mavx512bf16 -mavx512vbmi)
  set(BITGRAIN_ISA_amx ${_avx512} -mavx512bf16 -mavx512vbmi -mamx-tile -mamx-int8 -mamx-bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(BITGRAIN_ISA_neon -march=armv8.2-a+dotprod+fp16)
endif()

set(BITGRAIN_LEVELS avx2 avxvnni avx512vnni avx512bf16 amx neon CACHE STRING "Levels to build beside the portable one")
# its vectors are passed to no code of another level: nobody minds how. It is not there for speed
set(BITGRAIN_ISA_portable -Wno-psabi)
if(NOT BITGRAIN_SANITIZE)
  list(APPEND BITGRAIN_ISA_portable -O2)
endif()
set_source_files_properties("${_native_dir}/isa/portable.cpp" PROPERTIES COMPILE_OPTIONS "${BITGRAIN_ISA_portable}")

set(BITGRAIN_ISAS "")
foreach(isa ${BITGRAIN_LEVELS})
  if(DEFINED BITGRAIN_ISA_${isa} AND EXISTS "${_native_dir}/isa/${isa}.cpp")
    list(APPEND BITGRAIN_ISAS ${isa})
    list(APPEND BITGRAIN_SOURCES "${_native_dir}/isa/${isa}.cpp")
    set_source_files_properties("${_native_dir}/isa/${isa}.cpp" PROPERTIES COMPILE_OPTIONS "${BITGRAIN_ISA_${isa}}")
  endif()
endforeach()

function(bitgrain_configure target)
  target_include_directories(${target} PRIVATE "${_native_dir}")
  # no contraction: a product and a sum are rounded apart unless the source says fma, at every instruction set
  target_compile_options(${target} PRIVATE -O3 -Wall -Wextra -ffp-contract=off -fvisibility=hidden)
  foreach(isa ${BITGRAIN_ISAS})
    string(TOUPPER ${isa} upper)
    target_compile_definitions(${target} PRIVATE BITGRAIN_HAS_${upper}=1)
  endforeach()
  target_link_libraries(${target} PRIVATE Threads::Threads)
  if(BITGRAIN_SANITIZE)
    set(sanitizers $<IF:$<STREQUAL:${BITGRAIN_SANITIZE},thread>,thread,address$<COMMA>undefined>)
    # null pointers die by themselves: checks of each take a quarter of the compiler's time
    target_compile_options(${target} PRIVATE -fsanitize=${sanitizers} -fno-sanitize=null -fno-sanitize-recover=all -g1 -O1)
    target_link_options(${target} PRIVATE -fsanitize=${sanitizers})
  endif()
endfunction()
