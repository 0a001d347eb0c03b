"""The arithmetic of OpenVINO's CPU kernels on 8-bit codes, in exact integers and single float32 roundings."""
